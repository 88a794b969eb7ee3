// What the barriers, shuffles and atomics of include/threads.cuh mean on the CPU.
#pragma once

// Instruction: __syncthreads();
DEVICE void block_sync(int line = __builtin_LINE()) { emulator_barrier(0, blockDim.x, line); }
// Instruction: bar.sync %0, %1;
DEVICE void named_barrier_sync(int id, int count, int line = __builtin_LINE()) {
    emulator_barrier(id, count, line);
}

// Instruction: __syncwarp();
DEVICE void warp_sync() {
    emulator_collective(32, 0xffffffff, [](void**, uint32_t) {}, nullptr, "warp_sync");
}
// Instruction: return __shfl_xor_sync(0xffffffff, x, mask);
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
// Instruction: return __shfl_sync(0xffffffff, x, from);
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
// Instruction: return __any_sync(0xffffffff, predicate);
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

// Instruction: __threadfence();
DEVICE void device_fence() { emulator_device_fence(); }
// Instruction: atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;
DEVICE uint32_t atomic_increment(uint32_t* counter) {
    uint32_t before = emulator_atomic_add(counter, 1, true);
    device_fence();
    return before;
}
// Instruction: red.release.gpu.global.add.u32 [%0], 1;
DEVICE void release_increment(uint32_t* counter) { emulator_atomic_add(counter, 1, true); }
// Instruction: ld.acquire.gpu.global.u32 %0, [%1];
DEVICE void wait_for_counter(uint32_t* counter, uint32_t n) {
    while (static_cast<int32_t>(emulator_atomic_load_acquire(counter) - n) < 0) emulator_yield();
}

// The threads of a block take turns, so nothing comes between a read and the write behind it.
// Instruction: return atomicAdd(counter, n);
DEVICE uint32_t atomic_add_shared(uint32_t* counter, uint32_t n) {
    uint32_t before = *counter;
    *counter = before + n;
    return before;
}
// Instruction: atomicAdd(sum, n);
DEVICE void atomic_add_shared(unsigned long long* sum, unsigned long long n) { *sum += n; }
// Instruction: atomicOr(word, bits);
DEVICE void atomic_or_shared(uint32_t* word, uint32_t bits) { *word |= bits; }

// A kernel runs when those before have ended; what it may not touch before the wait is checked.
// Instruction: griddepcontrol.wait;
DEVICE void griddep_wait() { emulator_griddep_wait(); }
// Instruction: griddepcontrol.launch_dependents;
DEVICE void griddep_launch_dependents() {}
