// Blocks that share a cluster: alive together, on neighbouring multiprocessors, reading each other's shared memory. Hopper and later.
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

// The same place in the shared memory of the cluster's block `rank`, which must not end before that is done with.
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

#endif // HOPPER
