// What the loads and copies of include/memory.cuh mean on the CPU.
#pragma once

// Instruction: extern __shared__ __align__(1024) char shared_bytes[]; return shared_bytes;
DEVICE char* shared_memory() { return emulator_thread()->shared; }
// The offset in the block's shared memory, which is what wgmma's descriptors hold.
// Instruction: return static_cast<uint32_t>(__cvta_generic_to_shared(p));
DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - emulator_thread()->shared);
}

// Instruction: asm volatile("" ::: "memory");
DEVICE void compiler_fence() {}
// Instruction: asm("" : "+l"(address)); return static_cast<const char*>(address);
DEVICE const char* opaque_address(const void* address) { return static_cast<const char*>(address); }
// Instruction: uint32_t at = shared_address(address); asm("" : "+r"(at));
//   return static_cast<char*>(__cvta_shared_to_generic(at));
DEVICE char* opaque_shared(char* address) { return address; }
// Instruction: ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];
DEVICE Pack16B load_streaming(const Pack16B* p) {
    emulator_check_read_only(p, 16);
    return *p;
}
// Instruction: prefetch.global.L2 [%0];
DEVICE void prefetch_l2_line(const void*) {}

// A copy happens no earlier than the wait for its group.
// Instruction: cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;
DEVICE void cp_async(void* shared, const void* global, bool valid) {
    emulator_cp_async(shared, global, valid ? 16 : 0, valid ? 0 : 16);
}
// Instruction: cp.async.commit_group;
DEVICE void cp_async_commit_group() { emulator_cp_async_commit_group(); }
// Instruction: cp.async.wait_group %0;
template <int left>
DEVICE void cp_async_wait_group() {
    emulator_cp_async_wait_group(left);
}
