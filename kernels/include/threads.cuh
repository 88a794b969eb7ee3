// Threads working together: barriers, warp shuffles, atomics, and kernels that follow each other.
#pragma once
#include "numbers.cuh"

constexpr int WARP = 32;

DEVICE int warp_index() { return threadIdx.x / WARP; }
DEVICE int lane_index() { return threadIdx.x % WARP; }

#ifdef KERNEL_EMULATOR
#include "emulated/threads.h"
#else
DEVICE void block_sync() { __syncthreads(); }

// Waits at barrier 1 to 15 until `count` threads of the block, a multiple of 32, have come to it.
DEVICE void named_barrier_sync(int id, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

DEVICE void warp_sync() { __syncwarp(); }

// The value of the lane whose number differs from this lane's in the bits of `mask`.
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
// The value of lane `from`.
DEVICE uint32_t shuffle(uint32_t x, int from) { return __shfl_sync(0xffffffff, x, from); }
// Whether the predicate holds for any lane of the warp.
DEVICE bool warp_any(bool predicate) { return __any_sync(0xffffffff, predicate); }

// Orders this thread's reads and writes of device memory before the fence and behind it.
DEVICE void device_fence() { __threadfence(); }

// Increments a counter in device memory and returns its value before. Who sees the new value sees
// what this thread wrote before, and this thread sees what others wrote before they incremented.
// Two whole fences would each take longer than what this one instruction needs.
DEVICE uint32_t atomic_increment(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
}
// Increments a counter without learning its value.
DEVICE void release_increment(uint32_t* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// Waits until a counter in device memory has reached `n`; the counter may wrap around on the way.
// Only for cooperative launches, in which the blocks that increment it are sure to run.
DEVICE void wait_for_counter(uint32_t* counter, uint32_t n) {
    uint32_t now;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (static_cast<int32_t>(now - n) < 0);
}

// Atomics in shared memory.
DEVICE uint32_t atomic_add_shared(uint32_t* counter, uint32_t n) { return atomicAdd(counter, n); }
DEVICE void atomic_add_shared(unsigned long long* sum, unsigned long long n) { atomicAdd(sum, n); }
DEVICE void atomic_or_shared(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }

// Waits until the kernels before this one have ended and their results can be read. A kernel that
// is launched as their dependent begins earlier, and overlaps what comes before this call (loading
// weights, computing indices) with their end.
DEVICE void griddep_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Allows the dependent kernel to begin on multiprocessors that this one leaves free.
DEVICE void griddep_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

DEVICE uint32_t shuffle_xor(uint32_t x, int mask) {
    return float_as_uint(shuffle_xor(uint_as_float(x), mask));
}

// All lanes get the result. The order of the additions does not depend on the values.
DEVICE float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
DEVICE float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
