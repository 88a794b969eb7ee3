// Sums over the threads of a block, in an order that depends on nothing but their number.
#pragma once
#include "memory.cuh"
#include "threads.cuh"

// The sum of what all THREADS threads give; every thread gets it. Takes 8 bytes of shared memory
// for each thread, which may be used again after the next barrier.
template <int THREADS>
DEVICE double block_sum(double x) {
    double* sums = reinterpret_cast<double*>(shared_memory());
    sums[threadIdx.x] = x;
    block_sync();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < static_cast<uint32_t>(half))
            sums[threadIdx.x] += sums[threadIdx.x + half];
        block_sync();
    }
    return sums[0];
}
