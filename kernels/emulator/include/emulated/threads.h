// What the barriers, shuffles and atomics of include/threads.cuh mean on the CPU.
#pragma once

DEVICE void block_sync() { emulator_barrier(0, blockDim.x); }
DEVICE void named_barrier_sync(int id, int count) { emulator_barrier(id, count); }

DEVICE void warp_sync() {
    emulator_collective(32, 0xffffffff, [](void**, uint32_t) {}, nullptr, "warp_sync");
}
DEVICE float shuffle_xor(float x, int mask) {
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
}
DEVICE uint32_t shuffle(uint32_t x, int from) {
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
        &lane, "shuffle");
    return lane.out;
}
DEVICE bool warp_any(bool predicate) {
    struct Lane {
        bool predicate, any;
    } lane = {predicate, false};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            bool any = false;
            for (int i = 0; i < 32; i++) any |= static_cast<Lane*>(data[i])->predicate;
            for (int i = 0; i < 32; i++) static_cast<Lane*>(data[i])->any = any;
        },
        &lane, "warp_any");
    return lane.any;
}

// Blocks run on several threads of this machine, whose atomics order memory as the GPU's do.
DEVICE void device_fence() {}
DEVICE uint32_t atomic_increment(uint32_t* counter) {
    return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
}
DEVICE void release_increment(uint32_t* counter) {
    __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
}
DEVICE void wait_for_counter(uint32_t* counter, uint32_t n) {
    while (static_cast<int32_t>(__atomic_load_n(counter, __ATOMIC_ACQUIRE) - n) < 0) {
        emulator_yield();
    }
}

// The threads of a block take turns, so nothing comes between a read and the write behind it.
DEVICE uint32_t atomic_add_shared(uint32_t* counter, uint32_t n) {
    uint32_t before = *counter;
    *counter = before + n;
    return before;
}
DEVICE void atomic_add_shared(unsigned long long* sum, unsigned long long n) { *sum += n; }
DEVICE void atomic_or_shared(uint32_t* word, uint32_t bits) { *word |= bits; }

// A launch begins when the one before has ended.
DEVICE void griddep_wait() {}
DEVICE void griddep_launch_dependents() {}
