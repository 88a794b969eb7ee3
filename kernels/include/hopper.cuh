// What Hopper adds for a single block: mbarriers, TMA, and moving registers between warpgroups. The
// tensor core instructions of warpgroups are in wgmma.cuh, clusters of blocks in cluster.cuh.
#pragma once
#include "memory.cuh"
#include "threads.cuh"

constexpr int WARPGROUP = 128;

// Describes a matrix to TMA. The host encodes it (src/device) and passes it by value.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

#if HOPPER

#ifdef KERNEL_EMULATOR
#include "emulated/hopper.h"
#else
// Broadcast from the first lane, so that the compiler sees that a warp's threads agree.
DEVICE int warpgroup_index() { return __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0); }

// An mbarrier is 8 bytes of shared memory. Its phases have parity 0, 1, 0 and so on; a phase ends
// when `count` threads have arrived and all expected bytes have been written.
DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}
// Makes what was stored to shared memory visible to TMA and wgmma.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Makes initialized mbarriers visible to TMA and to the cluster.
DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_proxy_async();
}
DEVICE void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
// Arrives, and has the phase wait for `bytes` more.
DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
// Waits until the phase of this parity has ended. No wait of a correct kernel lasts ten seconds:
// rather than hang, the kernel traps.
DEVICE void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done, late;\n.reg .u64 start, now;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end;\n"
                 "mov.u64 start, %%globaltimer;\n"
                 "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra "
                 "end;\n"
                 "mov.u64 now, %%globaltimer;\nsub.u64 now, now, start;\nsetp.gt.u64 late, now, "
                 "10000000000;\n@late trap;\n"
                 "bra again;\nend:\n}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// Brings the map itself to the cache that TMA reads it from.
DEVICE void prefetch_tensormap(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map));
}
// Has TMA copy the tile whose first element is (row, column) to `shared`, which is aligned to 1024
// bytes. The tile has rows of 128 bytes; the 16-byte chunks of a row are swizzled by its number.
// Elements beyond the matrix are zeros. The bytes count towards the phase of `barrier`.
DEVICE void tma_load(void* shared, const TensorMap* map, uint32_t row, uint32_t column,
                     uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}

// Sets how many registers each thread of this warpgroup has from here on: a warpgroup that only
// issues copies releases some (dec), and those that compute take them (inc).
template <int count>
DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
#endif

// Initializes the two mbarriers of each stage of a pipeline; all threads of the block call it. A
// stage is full once one thread has arrived and its bytes have been written, and empty once
// `consumers` threads have arrived.
DEVICE void init_pipeline_stages(uint64_t* full, uint64_t* empty, int stages, uint32_t consumers) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], consumers);
        }
        fence_mbarrier_init();
    }
    block_sync();
}

#endif // HOPPER
