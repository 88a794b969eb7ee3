// Loads, stores and copies.
#pragma once
#include "numbers.cuh"

// The block's shared memory, as much as the launch asked for; aligned to 1024 bytes.
DEVICE char* shared_memory() {
#ifdef KERNEL_EMULATOR
    return emulator_thread()->shared;
#else
    extern __shared__ __align__(1024) char shared_bytes[];
    return shared_bytes;
#endif
}

DEVICE Eight load(const Eight* p) { return *p; }

// Keeps the compiler from bringing loads from behind here to before it.
DEVICE void keep_order() {
#ifndef KERNEL_EMULATOR
    asm volatile("" ::: "memory");
#endif
}

// Sixteen bytes that this kernel reads once and nobody writes meanwhile.
DEVICE Eight load_once(const Eight* p) {
#ifdef KERNEL_EMULATOR
    return *p;
#else
    Eight v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.pairs[0]), "=r"(v.pairs[1]), "=r"(v.pairs[2]), "=r"(v.pairs[3])
                 : "l"(p));
    return v;
#endif
}

// Has `bytes` from `p` on brought to the second-level cache, by thread `i` of `count`. What a
// kernel reads once it has its sums (biases, a norm's gain and shift) is in no stream of weights:
// asked for early, nobody waits for memory then.
DEVICE void prefetch(const void* p, uint32_t bytes, uint32_t i, uint32_t count) {
    for (uint32_t at = i * 128; at < bytes; at += count * 128) {
        const char* line = static_cast<const char*>(p) + at;
#ifdef KERNEL_EMULATOR
        emulator_check(line, 1);
#else
        asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#endif
    }
}

// Copies 16 bytes to shared memory, in the background; zeros instead if not `valid`.
DEVICE void copy_async(void* shared, const void* global, bool valid) {
#ifdef KERNEL_EMULATOR
    emulator_copy_async(shared, global, valid ? 16 : 0, valid ? 0 : 16);
#else
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
#endif
}
DEVICE void copy_commit() {
#ifdef KERNEL_EMULATOR
    emulator_copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until all but the `left` youngest groups of this thread's copies have arrived.
template <int left>
DEVICE void copy_wait() {
#ifdef KERNEL_EMULATOR
    emulator_copy_wait(left);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}
