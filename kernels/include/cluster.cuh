// Clusters of thread blocks: neighbours along x that run at the same time, can read each other's
// shared memory and can share TMA copies. Hopper and later.
#pragma once
#include "hopper.cuh"

#if HOPPER

#ifdef KERNEL_EMULATOR
#include "emulated/cluster.h"
#else
// How many blocks the cluster has, and this block's number among them.
DEVICE uint32_t cluster_size() {
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
}
DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
    return rank;
}

// Waits for all threads of the cluster. What they wrote to shared memory before can be read behind.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same variable in the shared memory of the cluster's block `rank`, which must not end before
// the last access to it.
template <class X>
DEVICE X* map_shared_rank(X* shared, uint32_t rank) {
    uint64_t at;
    asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(shared), "r"(rank));
    return reinterpret_cast<X*>(at);
}

// Arrives at the same mbarrier of the cluster's block `rank`, without release semantics: the
// threads that arrive have only read shared memory, through wgmma, which they have waited for. A
// release at cluster scope would cost two fences of the whole device.
DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}

// tma_load to the same address in each block of the cluster whose bit is set in `blocks`. The bytes
// count towards each block's own mbarrier.
DEVICE void tma_load_multicast(uint32_t blocks, void* shared, const TensorMap* map, uint32_t row,
                               uint32_t column, uint64_t* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes."
                 "multicast::cluster [%0], [%1, {%2, %3}], "
                 "[%4], %5;" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)),
                 "h"(static_cast<uint16_t>(blocks))
                 : "memory");
}
#endif

#endif // HOPPER
