// Blocks that share a cluster: alive together, on neighbouring multiprocessors, reading each
// other's shared memory. Hopper and later.
#pragma once
#include "hopper.cuh"

#if HOPPER

// This block's number in its cluster, and how many there are: neighbours along x.
DEVICE uint32_t cluster_size() {
#ifdef KERNEL_EMULATOR
    return emulator_cluster_size();
#else
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
#endif
}
DEVICE uint32_t cluster_rank() {
#ifdef KERNEL_EMULATOR
    return blockIdx.x % emulator_cluster_size();
#else
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
    return rank;
#endif
}

// Waits for all threads of the cluster; what they wrote to shared memory before is seen behind it.
DEVICE void sync_cluster() {
#ifdef KERNEL_EMULATOR
    emulator_cluster_barrier();
#else
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the shared memory of the cluster's block `rank`, which must not end before that
// is done with.
template <class X>
DEVICE X* in_cluster(X* shared, uint32_t rank) {
#ifdef KERNEL_EMULATOR
    return static_cast<X*>(emulator_cluster_shared(shared, rank));
#else
    uint64_t at;
    asm("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(shared), "r"(rank));
    return reinterpret_cast<X*>(at);
#endif
}

// `barrier_arrive` at the same barrier object of the cluster's block `rank`. Unqualified: the
// threads that arrive have only read, through the tensor cores, whose products they have waited
// for; a release for the cluster would be two fences of the whole device.
DEVICE void barrier_arrive_in(uint64_t* barrier, uint32_t rank) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_arrive_in(barrier, rank);
#else
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
#endif
}

// `copy_tile` to the same place of each block of the cluster whose bit is set in `blocks`; the
// bytes arrive at each one's own barrier.
DEVICE void copy_tile_to(uint32_t blocks, void* shared, const TensorMap* map, uint32_t row,
                         uint32_t column, uint64_t* barrier) {
#ifdef KERNEL_EMULATOR
    emulator_copy_tile(shared, map, row, column, barrier, blocks);
#else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes."
                 "multicast::cluster [%0], [%1, {%2, %3}], "
                 "[%4], %5;" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)),
                 "h"(static_cast<uint16_t>(blocks))
                 : "memory");
#endif
}

#endif // HOPPER
