// Threads among themselves: barriers, warps, blocks that follow each other.
#pragma once
#include "numbers.cuh"

constexpr int WARP = 32;

DEVICE int warp_index() { return threadIdx.x / WARP; }
DEVICE int lane_index() { return threadIdx.x % WARP; }

DEVICE void sync_block() {
#ifdef KERNEL_EMULATOR
    emulator_barrier(0, blockDim.x);
#else
    __syncthreads();
#endif
}

// Barrier 1 to 15 among `count` threads of the block, a multiple of 32.
DEVICE void sync_some(int id, int count) {
#ifdef KERNEL_EMULATOR
    emulator_barrier(id, count);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

DEVICE void sync_warp() {
#ifdef KERNEL_EMULATOR
    emulator_collective(32, 0xffffffff, [](void**, uint32_t) {}, nullptr, "sync_warp");
#else
    __syncwarp();
#endif
}

// The value of the lane whose number differs in the bits of `mask`.
DEVICE float shuffle_xor(float x, int mask) {
#ifdef KERNEL_EMULATOR
    struct Lane {
        float in, out;
        int mask;
    } lane = {x, 0, mask};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            for (int i = 0; i < 32; i++) {
                Lane* me = static_cast<Lane*>(data[i]);
                me->out = static_cast<Lane*>(data[i ^ me->mask])->in;
            }
        },
        &lane, "shuffle_xor");
    return lane.out;
#else
    return __shfl_xor_sync(0xffffffff, x, mask);
#endif
}
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) {
    return bits_of_float(shuffle_xor(float_of_bits(x), mask));
}

// The value of lane `from`.
DEVICE uint32_t shuffle_from(uint32_t x, int from) {
#ifdef KERNEL_EMULATOR
    struct Lane {
        uint32_t in, out;
        int from;
    } lane = {x, 0, from};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            for (int i = 0; i < 32; i++) {
                Lane* me = static_cast<Lane*>(data[i]);
                me->out = static_cast<Lane*>(data[me->from])->in;
            }
        },
        &lane, "shuffle_from");
    return lane.out;
#else
    return __shfl_sync(0xffffffff, x, from);
#endif
}

// Whether it is so for any lane of the warp.
DEVICE bool any_lane(bool here) {
#ifdef KERNEL_EMULATOR
    struct Lane {
        bool here, any;
    } lane = {here, false};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            bool any = false;
            for (int i = 0; i < 32; i++) any |= static_cast<Lane*>(data[i])->here;
            for (int i = 0; i < 32; i++) static_cast<Lane*>(data[i])->any = any;
        },
        &lane, "any_lane");
    return lane.any;
#else
    return __any_sync(0xffffffff, here);
#endif
}

// All lanes get the sum, added in the same order whatever the values.
DEVICE float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
DEVICE float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

// What this thread knows to be written, by whichever block, is what it reads from here on.
DEVICE void fence_device() {
#ifndef KERNEL_EMULATOR
    __threadfence();
#endif
}

// Adds to a counter in device memory and returns what it was; what this thread wrote before is seen
// by whoever sees the new value.
DEVICE uint32_t count_up(uint32_t* counter) {
#ifdef KERNEL_EMULATOR
    return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
#else
    fence_device();
    uint32_t before = atomicAdd(counter, 1u);
    fence_device();
    return before;
#endif
}

// The same for whoever does not ask what it was: one fence less.
DEVICE void count_arrival(uint32_t* counter) {
#ifdef KERNEL_EMULATOR
    __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
#else
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#endif
}

// Waits until a counter in device memory has come to `n`, also if it runs over on the way. The
// blocks that count must be alive: cooperative launches alone.
DEVICE void wait_for_count(uint32_t* counter, uint32_t n) {
#ifdef KERNEL_EMULATOR
    while (static_cast<int32_t>(__atomic_load_n(counter, __ATOMIC_ACQUIRE) - n) < 0)
        emulator_yield();
#else
    uint32_t now;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (static_cast<int32_t>(now - n) < 0);
#endif
}

// Adds to a counter in shared memory and returns what it was; sets bits in shared memory.
DEVICE uint32_t add_shared(uint32_t* counter, uint32_t n) {
#ifdef KERNEL_EMULATOR
    uint32_t before = *counter;
    *counter = before + n;
    return before;
#else
    return atomicAdd(counter, n);
#endif
}
DEVICE void add_shared(unsigned long long* sum, unsigned long long n) {
#ifdef KERNEL_EMULATOR
    *sum += n;
#else
    atomicAdd(sum, n);
#endif
}
DEVICE void set_bits_shared(uint32_t* word, uint32_t bits) {
#ifdef KERNEL_EMULATOR
    *word |= bits;
#else
    atomicOr(word, bits);
#endif
}

// Waits for the kernels that this one was launched to follow: what they wrote may be read from here
// on. What comes before (weights, the thread's place) overlaps with their end.
DEVICE void wait_for_earlier_kernels() {
#if !defined(KERNEL_EMULATOR) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the kernel that follows begin.
DEVICE void let_next_kernel_begin() {
#if !defined(KERNEL_EMULATOR) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
