// What include/cluster.cuh means on the CPU.
#pragma once

// Instruction: mov.u32 %0, %%cluster_nctaid.x;
DEVICE uint32_t cluster_size() { return emulator_cluster_size(); }
// Instruction: mov.u32 %0, %%cluster_ctaid.x;
DEVICE uint32_t cluster_rank() { return blockIdx.x % emulator_cluster_size(); }
// Instruction: barrier.cluster.arrive.release; barrier.cluster.wait.acquire;
DEVICE void cluster_sync() { emulator_cluster_barrier(); }
// Instruction: mapa.u64 %0, %1, %2;
template <class X>
DEVICE X* map_shared_rank(X* shared, uint32_t rank) {
    return static_cast<X*>(emulator_cluster_shared(shared, rank));
}
// Instruction: { .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;
//   mbarrier.arrive.shared::cluster.b64 _, [there]; }
DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
    emulator_mbarrier_arrive_cluster(barrier, rank);
}
// Instruction: cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.
//   multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;
DEVICE void tma_load_multicast(uint32_t blocks, void* shared, const TensorMap* map, uint32_t row,
                               uint32_t column, uint64_t* barrier) {
    emulator_tma_load(shared, map, row, column, barrier, blocks);
}
