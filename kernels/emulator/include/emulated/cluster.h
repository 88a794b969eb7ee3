// What include/cluster.cuh means on the CPU.
#pragma once

DEVICE uint32_t cluster_size() { return emulator_cluster_size(); }
DEVICE uint32_t cluster_rank() { return blockIdx.x % emulator_cluster_size(); }
DEVICE void cluster_sync() { emulator_cluster_barrier(); }
template <class X>
DEVICE X* map_shared_rank(X* shared, uint32_t rank) {
    return static_cast<X*>(emulator_cluster_shared(shared, rank));
}
DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
    emulator_mbarrier_arrive_cluster(barrier, rank);
}
DEVICE void tma_load_multicast(uint32_t blocks, void* shared, const TensorMap* map, uint32_t row,
                               uint32_t column, uint64_t* barrier) {
    emulator_tma_load(shared, map, row, column, barrier, blocks);
}
