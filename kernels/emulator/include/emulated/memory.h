// What the loads and copies of include/memory.cuh mean on the CPU.
#pragma once

DEVICE char* shared_memory() { return emulator_thread()->shared; }
// The offset in the block's shared memory, which is what wgmma's descriptors hold.
DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - emulator_thread()->shared);
}

DEVICE void compiler_fence() {}
DEVICE const char* opaque_address(const void* address) { return static_cast<const char*>(address); }
DEVICE Pack16B load_streaming(const Pack16B* p) { return *p; }
DEVICE void prefetch_l2_line(const void* line) { emulator_check(line, 1); }

// A copy happens no earlier than the wait for its group.
DEVICE void cp_async(void* shared, const void* global, bool valid) {
    emulator_cp_async(shared, global, valid ? 16 : 0, valid ? 0 : 16);
}
DEVICE void cp_async_commit_group() { emulator_cp_async_commit_group(); }
template <int left>
DEVICE void cp_async_wait_group() {
    emulator_cp_async_wait_group(left);
}
