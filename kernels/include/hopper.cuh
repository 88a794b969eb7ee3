// What only Hopper has: barrier objects in shared memory, and the copy engine for tiles (TMA).
// Products of warpgroups are in warpgroup.cuh. Compiled for sm_90a; in the emulator always.
#pragma once
#include "threads.cuh"

constexpr int WARPGROUP = 128;

// A matrix that the copy engine reads tiles of; made by the host (src/device). Passed by value.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

#if defined(KERNEL_EMULATOR) || (defined(__CUDA_ARCH_FEAT_SM90_ALL))
#define HOPPER 1
#else
#define HOPPER 0
#endif

#if HOPPER

// The same for all threads of a warp, as the compiler sees too.
DEVICE int warpgroup_index() {
#ifdef KERNEL_EMULATOR
    return threadIdx.x / WARPGROUP;
#else
    return __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
#endif
}

#ifndef KERNEL_EMULATOR
DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// A barrier object is 8 bytes of shared memory. Its phases begin with 0; a phase ends when `count`
// arrivals and all expected bytes have come.
DEVICE void barrier_init(uint64_t* barrier, uint32_t count) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_init(barrier, count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
#endif
}
// Makes initialized barriers seen by the copy engine.
DEVICE void barrier_init_done() {
#ifndef KERNEL_EMULATOR
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Two barriers for each stage of a ring, by all threads of the block: full once one thread has
// arrived and its bytes have come, empty once `consumers` threads have arrived.
DEVICE void init_stages(uint64_t* full, uint64_t* empty, int stages, uint32_t consumers) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], consumers);
        }
        barrier_init_done();
    }
    sync_block();
}
DEVICE void barrier_arrive(uint64_t* barrier) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_arrive(barrier, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
#endif
}
// Arrives, and lets the phase wait for so many bytes more.
DEVICE void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_arrive(barrier, bytes);
#else
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
#endif
}
// Waits until the phase of this parity has ended. Nothing that works takes ten seconds: rather than
// wait for ever, the kernel fails.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_wait(barrier, parity);
#else
    asm volatile(
        "{\n.reg .pred done, late;\n.reg .u64 start, now;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end;\n"
        "mov.u64 start, %%globaltimer;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end;\n"
        "mov.u64 now, %%globaltimer;\nsub.u64 now, now, start;\nsetp.gt.u64 late, now, "
        "10000000000;\n@late trap;\n"
        "bra again;\nend:\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// Has the map itself brought to where the copy engine looks for it.
DEVICE void prefetch_map(const TensorMap* map) {
#ifndef KERNEL_EMULATOR
    asm volatile("prefetch.tensormap [%0];" ::"l"(map));
#else
    static_cast<void>(map);
#endif
}

// Copies the map's tile whose first element is (row, column) to `shared` (aligned to 1024 bytes;
// rows of 128 bytes whose 16-byte pieces are swizzled by the row's number), zeros beyond the
// matrix; its bytes arrive at `barrier`.
DEVICE void copy_tile(void* shared, const TensorMap* map, uint32_t row, uint32_t column,
                      uint64_t* barrier) {
#ifdef KERNEL_EMULATOR
    emulator_copy_tile(shared, map, row, column, barrier, 0);
#else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
#endif
}

// Registers of each thread of this warpgroup from here on.
template <int count>
DEVICE void give_registers() {
#ifndef KERNEL_EMULATOR
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
DEVICE void take_registers() {
#ifndef KERNEL_EMULATOR
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

#endif // HOPPER
