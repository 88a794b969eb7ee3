// Loads, prefetches and asynchronous copies that every GPU since Ampere has.
#pragma once
#include "numbers.cuh"

#ifdef KERNEL_EMULATOR
#include "emulated/memory.h"
#else
// The block's dynamic shared memory, as much as the launch asked for, aligned to 1024 bytes as
// TMA's swizzled tiles must be.
DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char shared_bytes[];
    return shared_bytes;
}
// The address in the shared window, which is what PTX instructions take.
DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Keeps the compiler from moving later loads up across this point.
DEVICE void compiler_fence() { asm volatile("" ::: "memory"); }

// The same address, but the compiler no longer sees where it comes from: 32-bit offsets are then
// added to it, where the compiler would otherwise compute every address in 64 bits.
DEVICE const char* opaque_address(const void* address) {
    asm("" : "+l"(address));
    return static_cast<const char*>(address);
}

// The same address in shared memory, kept in a register: the compiler would otherwise compute the
// address of shared memory from the number of the block in its cluster wherever it is used.
DEVICE char* opaque_shared(char* address) {
    uint32_t at = shared_address(address);
    asm("" : "+r"(at));
    return static_cast<char*>(__cvta_shared_to_generic(at));
}

// Loads 16 bytes that this kernel reads once and nobody writes meanwhile, past the L1 cache.
DEVICE Pack16B load_streaming(const Pack16B* p) {
    Pack16B v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.pairs[0]), "=r"(v.pairs[1]), "=r"(v.pairs[2]), "=r"(v.pairs[3])
                 : "l"(p));
    return v;
}

// Brings one line of 128 bytes to the L2 cache.
DEVICE void prefetch_l2_line(const void* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// Copies 16 bytes to shared memory asynchronously, or writes zeros if not `valid`. The copies of a
// thread belong to the group that it commits next.
DEVICE void cp_async(void* shared, const void* global, bool valid) {
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the `left` youngest groups of this thread are still being copied.
template <int left>
DEVICE void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}
#endif

DEVICE Pack16B load(const Pack16B* p) { return *p; }

// Brings `bytes` from `p` on to the L2 cache; the work is that of thread `i` of `count`. What a
// kernel reads after its main loop (biases, a norm's weight and bias) is part of no stream of
// weights, so a kernel asks for it early and does not wait for memory at its end.
DEVICE void prefetch_l2(const void* p, uint32_t bytes, uint32_t i, uint32_t count) {
    for (uint32_t at = i * 128; at < bytes; at += count * 128) {
        prefetch_l2_line(static_cast<const char*>(p) + at);
    }
}
