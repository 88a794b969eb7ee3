// What both prefill kernels do with the 16 queries of a warp. Operands and accumulators are spread
// over the lanes as the tensor cores have them: lane / 4 is the query (and the one 8 below it), 2
// (lane % 4) the first of two columns.
#pragma once
#include "threads.cuh"

// The tile of this block. Blocks begin in the order of their numbers and the last tiles of a prompt
// attend to the most positions, so these come first: a long tile that began last would leave most
// multiprocessors idle at the end.
DEVICE uint32_t tile_number() { return gridDim.y - 1 - blockIdx.y; }

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

// For the two queries of a lane, which are 8 rows apart: the maximum to which weights are relative,
// and the sum of the weights of this lane's own positions.
struct SoftmaxState {
    float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
};

constexpr float LOG2_E = 1.44269504f;

// The largest logarithm of a softmax weight. ALiBi has the maximum grow a little with almost every
// step; as long as weights stay far from the largest number of f16, nothing has to be rescaled.
constexpr float MAX_LOG2_WEIGHT = 8;

// Turns the scores of a step's positions, from `first` on, into softmax weights relative to
// `softmax.max`; `scores` are ordered as accumulators. `rescale` is the factor that brings earlier
// results to the new maximum, most often one. If `masked`, some query does not attend to all
// positions. Exponentials have base 2: `scale` and `slope` contain log2(e).
DEVICE void online_softmax(float* scores, SoftmaxState& softmax, float (&rescale)[2],
                           const uint32_t (&positions)[2], uint32_t first, bool masked, float scale,
                           float slope) {
    constexpr int COLUMNS = ATTENTION_STEP / 8; // pairs of positions that a lane has
    int own = static_cast<int>(first) + 2 * (lane_index() % 4); // a lane's first position
    // ALiBi relative to `own`, which is the same for both queries
    UNROLL
    for (int i = 0; i < 2 * COLUMNS; i++) {
        float bias = slope * static_cast<float>(i / 2 * 8 + i % 2);
        UNROLL
        for (int half = 0; half < 2; half++) {
            float& x = scores[i / 2 * 4 + 2 * half + i % 2];
            x = x * scale + bias;
        }
    }
    if (masked) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            int last = static_cast<int>(positions[half]) - own;
            UNROLL
            for (int i = 0; i < 2 * COLUMNS; i++) {
                float& x = scores[i / 2 * 4 + 2 * half + i % 2];
                if (i / 2 * 8 + i % 2 > last) x = -INFINITY;
            }
        }
    }
    // two maxima for each query, since an instruction waits for the one before in the same chain
    float parts[4] = {scores[0], scores[1], scores[2], scores[3]};
    UNROLL
    for (int i = 4; i < 4 * COLUMNS; i++) parts[i % 4] = fmaxf(parts[i % 4], scores[i]);
    UNROLL
    for (int half = 0; half < 2; half++) {
        // small distances are exact in f32
        float base = slope * static_cast<float>(own - static_cast<int>(positions[half]));
        // the positions of a query are spread over four neighbouring lanes
        float max = fmaxf(parts[2 * half], parts[2 * half + 1]) + base;
        max = fmaxf(max, shuffle_xor(max, 1));
        max = fmaxf(max, shuffle_xor(max, 2));
        // Weights may be a little larger than one. Every query attends to position 0, so the
        // maximum is finite after the first step.
        if (max <= softmax.max[half] + MAX_LOG2_WEIGHT) max = softmax.max[half];
        rescale[half] = exp2_approx(softmax.max[half] - max);
        softmax.max[half] = max;
        float relative = max - base, sum = 0;
        UNROLL
        for (int i = 0; i < 2 * COLUMNS; i++) {
            float& x = scores[i / 2 * 4 + 2 * half + i % 2];
            x = exp2_approx(x - relative);
            sum += x;
        }
        softmax.sum[half] = softmax.sum[half] * rescale[half] + sum;
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
        float inverse = 1.0f / sum; // a division takes some ten instructions
        UNROLL
        for (int d = 0; d < SIZE / 8; d++) {
            *reinterpret_cast<uint32_t*>(row + d * 8 + 2 * t) =
                pack<T>(out[4 * d + 2 * half] * inverse, out[4 * d + 2 * half + 1] * inverse);
        }
    }
}
