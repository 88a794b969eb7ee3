// What the mbarriers and TMA copies of include/hopper.cuh mean on the CPU.
#pragma once

// Instruction: return __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
DEVICE int warpgroup_index() { return threadIdx.x / WARPGROUP; }

// Instruction: mbarrier.init.shared::cta.b64 [%0], %1;
DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
    emulator_mbarrier_init(barrier, count);
}
// Instruction: fence.proxy.async.shared::cta;
DEVICE void fence_proxy_async() { emulator_fence_proxy_async(); }
// Instruction: fence.mbarrier_init.release.cluster;
DEVICE void fence_mbarrier_init() { emulator_fence_mbarrier_init(); }
// Instruction: mbarrier.arrive.shared::cta.b64 _, [%0];
DEVICE void mbarrier_arrive(uint64_t* barrier) { emulator_mbarrier_arrive(barrier, 0); }
// Instruction: mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;
DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    emulator_mbarrier_arrive(barrier, bytes);
}
// Instruction: { .reg .pred done, late; .reg .u64 start, now;
//   mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra end; mov.u64
//   start, %%globaltimer; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0],
//   %1; @done bra end; mov.u64 now, %%globaltimer; sub.u64 now, now, start; setp.gt.u64
//   late, now, 10000000000; @late trap; bra again; end: }
DEVICE void mbarrier_wait_parity(uint64_t* barrier, uint32_t parity) {
    emulator_mbarrier_wait(barrier, parity);
}

// Instruction: prefetch.tensormap [%0];
DEVICE void prefetch_tensormap(const TensorMap*) {}
// Instruction: cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
//   [%0], [%1, {%2, %3}], [%4];
DEVICE void tma_load(void* shared, const TensorMap* map, uint32_t row, uint32_t column,
                     uint64_t* barrier) {
    emulator_tma_load(shared, map, row, column, barrier, 0);
}

// Instruction: setmaxnreg.dec.sync.aligned.u32 %0;
template <int count>
DEVICE void setmaxnreg_dec() {
    emulator_setmaxnreg(count, false);
}
// Instruction: setmaxnreg.inc.sync.aligned.u32 %0;
template <int count>
DEVICE void setmaxnreg_inc() {
    emulator_setmaxnreg(count, true);
}
