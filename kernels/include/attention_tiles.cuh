// Many queries at a time: what both prefill kernels do with a warp's 16 queries. As operands and
// sums of the tensor cores they are spread over the lanes: lane / 4 is the query (and the one 8
// below), 2 (lane % 4) the first of two columns.
#pragma once
#include "attention.cuh"
#include "threads.cuh"

// Queries as operands; `rows`: this lane's two, counted from `first_token`.
template <class T, int SIZE>
DEVICE void load_queries(uint32_t (&q)[SIZE / 16][4], const Attention& a, uint32_t first_token,
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

// Writes weighted sums, SIZE / 2 of a lane, over the sums of weights, of which a lane has its
// positions' part. Queries from `count` on are nobody's.
template <class T, int SIZE>
DEVICE void store_results(const Attention& a, uint32_t first_token, const uint32_t (&queries)[2],
                          uint32_t count, uint32_t head, const float* out,
                          const float (&weight)[2]) {
    int t = lane_index() % 4;
    UNROLL
    for (int half = 0; half < 2; half++) {
        float sum = weight[half];
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
