// What the mbarriers and TMA copies of include/hopper.cuh mean on the CPU.
#pragma once

DEVICE int warpgroup_index() { return threadIdx.x / WARPGROUP; }

DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
    emulator_mbarrier_init(barrier, count);
}
DEVICE void fence_mbarrier_init() {}
DEVICE void mbarrier_arrive(uint64_t* barrier) { emulator_mbarrier_arrive(barrier, 0); }
DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    emulator_mbarrier_arrive(barrier, bytes);
}
DEVICE void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
    emulator_mbarrier_wait(barrier, parity);
}

DEVICE void prefetch_tensormap(const TensorMap*) {}
DEVICE void tma_load(void* shared, const TensorMap* map, uint32_t row, uint32_t column,
                     uint64_t* barrier) {
    emulator_tma_load(shared, map, row, column, barrier, 0);
}

template <int count>
DEVICE void setmaxnreg_dec() {}
template <int count>
DEVICE void setmaxnreg_inc() {}
