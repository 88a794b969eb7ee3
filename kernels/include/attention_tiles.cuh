// What both prefill kernels do with the 16 queries of a warp. Operands and accumulators are spread
// over the lanes as the tensor cores have them: lane / 4 is the query (and the one 8 below it), 2
// (lane % 4) the first of two columns.
#pragma once
#include "threads.cuh"

// Loads queries as operands. `rows` are the two queries of this lane, counted from `first_token`.
template <class T, int SIZE>
DEVICE void load_queries(uint32_t (&q)[SIZE / 16][4], const AttentionArgs& a, uint32_t first_token,
                         const uint32_t (&rows)[2], uint32_t head) {
    int t = lane_index() % 4;
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            const T* row = static_cast<const T*>(a.q) +
                           (static_cast<size_t>(first_token + rows[j % 2]) * a.heads + head) * SIZE;
            q[i][j] = *reinterpret_cast<const uint32_t*>(row + i * 16 + j / 2 * 8 + 2 * t);
        }
    }
}

// Writes attention results: the weighted sums of values in `out`, SIZE / 2 of them in each lane,
// divided by the sums of the softmax weights, of which each lane has a part. Queries from `count`
// on do not exist.
template <class T, int SIZE>
DEVICE void store_results(const AttentionArgs& a, uint32_t first_token,
                          const uint32_t (&queries)[2], uint32_t count, uint32_t head,
                          const float* out, const float (&sum_exp)[2]) {
    int t = lane_index() % 4;
    UNROLL
    for (int half = 0; half < 2; half++) {
        float sum = sum_exp[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (queries[half] >= count) continue;
        T* row = static_cast<T*>(a.out) +
                 (static_cast<size_t>(first_token + queries[half]) * a.heads + head) * SIZE;
        UNROLL
        for (int d = 0; d < SIZE / 8; d++) {
            *reinterpret_cast<uint32_t*>(row + d * 8 + 2 * t) =
                pack<T>(out[4 * d + 2 * half] / sum, out[4 * d + 2 * half + 1] / sum);
        }
    }
}
