// What the kernels of training's attention have in common, whichever instructions they multiply
// with. A block takes one head of 64 tokens, in 4 warps of 16 rows. Operands and accumulators are
// spread over the lanes as the tensor cores have them: lane / 4 is the row (and the one 8 below
// it), 2 (lane % 4) the first of two columns.
#pragma once
#include "attention_tiles.cuh"
#include "memory.cuh"

constexpr int TILE = ATTENTION_TRAIN_TILE;
constexpr int THREADS = ATTENTION_TRAIN_WARPS * WARP;
constexpr float LN_2 = 0.693147181f;
static_assert(16 * ATTENTION_TRAIN_WARPS == TILE, "all tokens have a warp");
static_assert(TILE == ATTENTION_STEP, "steps of the forward pass begin where tiles do");

// What a block works on.
struct Work {
    uint32_t head, heads;
    AttentionTrainTile tile;
};
DEVICE Work work_of_block(const AttentionTrainArgs& a) {
    return {blockIdx.x, a.heads, a.tiles[blockIdx.y]};
}

// Where a token's query (part 0), key (1) or value (2) in this head begins.
template <int SIZE>
DEVICE size_t qkv_row(const Work& w, int part, uint32_t token) {
    return ((static_cast<size_t>(token) * w.heads + w.head) * 3 + part) * SIZE;
}
// Where a token's output in this head begins.
template <int SIZE>
DEVICE size_t output_row(const Work& w, uint32_t token) {
    return (static_cast<size_t>(token) * w.heads + w.head) * SIZE;
}
// Where a number of each token and head lies.
DEVICE size_t stat_of(const Work& w, uint32_t token) {
    return static_cast<size_t>(token) * w.heads + w.head;
}

// The two rows of this lane, `half` 0 and 1, in the tile.
DEVICE uint32_t lane_row(int half) { return warp_index() * 16 + lane_index() / 4 + 8 * half; }
// The token of a row. Rows beyond the last token compute it again, and do not store it.
DEVICE uint32_t token_of_row(const Work& w, uint32_t row) {
    uint32_t last = w.tile.count - 1;
    return w.tile.first + (row < last ? row : last);
}

// The factor of scores whose exponentials have base 2.
template <int SIZE>
DEVICE float score_scale() {
    return LOG2_E / sqrtf(static_cast<float>(SIZE));
}

// Loads the pairs that this lane has of an operand of 16 columns: of the row at `upper` and of the
// one at `lower`.
template <class T>
DEVICE void load_operand(uint32_t (&out)[4], const T* upper, const T* lower) {
    int t = lane_index() % 4;
    UNROLL
    for (int j = 0; j < 4; j++) {
        const T* row = j % 2 == 0 ? upper : lower;
        out[j] = *reinterpret_cast<const uint32_t*>(row + j / 2 * 8 + 2 * t);
    }
}
// Loads queries as operands.
template <class T, int SIZE>
DEVICE void load_train_queries(uint32_t (&q)[SIZE / 16][4], const AttentionTrainArgs& a,
                               const Work& w) {
    const T* qkv = static_cast<const T*>(a.qkv);
    const T* upper = qkv + qkv_row<SIZE>(w, 0, token_of_row(w, lane_row(0)));
    const T* lower = qkv + qkv_row<SIZE>(w, 0, token_of_row(w, lane_row(1)));
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) load_operand(q[i], upper + i * 16, lower + i * 16);
}

// Rounds 16 columns of accumulators to an operand.
template <class T>
DEVICE void pack_operand(uint32_t (&out)[4], const float* sums) {
    UNROLL
    for (int i = 0; i < 4; i++) out[i] = pack<T>(sums[2 * i], sums[2 * i + 1]);
}

// Writes this lane's part of one of its rows, multiplied by `factor`.
template <class T, int SIZE>
DEVICE void store_row(void* matrix, size_t at, const float* sums, int half, float factor) {
    T* row = static_cast<T*>(matrix) + at + 2 * (lane_index() % 4);
    UNROLL
    for (int d = 0; d < SIZE / 8; d++) {
        const float* pair = sums + 4 * d + 2 * half;
        *reinterpret_cast<uint32_t*>(row + d * 8) = pack<T>(pair[0] * factor, pair[1] * factor);
    }
}

// Writes the results of the forward pass: weighted sums of values in `sums`, to be divided by the
// sums of weights, of which each lane has a part.
template <class T, int SIZE>
DEVICE void store_attended(const AttentionTrainArgs& a, const Work& w, const float* sums,
                           const SoftmaxState& softmax) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        float sum = softmax.sum[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        uint32_t row = lane_row(half), token = w.tile.first + row;
        if (row >= w.tile.count) continue;
        if (lane_index() % 4 == 0) {
            a.lse[stat_of(w, token)] = softmax.max[half] * LN_2 + logf(sum);
        }
        // a division for each element would take some ten instructions
        store_row<T, SIZE>(a.y, output_row<SIZE>(w, token), sums, half, 1.0f / sum);
    }
}

// What the backward pass has to know of the queries of a lane: what they subtract from the
// logarithms of their weights, and from the gradients of these.
struct QueryStats {
    float logs[2], dots[2];
};
// The part of the logarithm that ALiBi and the sum of exponentials make up for a query; the key's
// part is slope * (its token - first token of the tile). Where weights are not negligible these are
// small numbers, so that their difference is exact enough.
DEVICE float log_of_query(const AttentionTrainArgs& a, const Work& w, uint32_t token, float slope) {
    int distance = static_cast<int>(token - w.tile.first);
    return a.lse[stat_of(w, token)] * LOG2_E + slope * static_cast<float>(distance);
}

// Loads gradients of results as operands, and what is to be known of this lane's queries. Leaves
// the dot products to the kernel for keys.
template <class T, int SIZE>
DEVICE QueryStats load_gradients(uint32_t (&dy)[SIZE / 16][4], const AttentionTrainArgs& a,
                                 const Work& w, float slope) {
    const T *gradients = static_cast<const T*>(a.dy), *results = static_cast<const T*>(a.y);
    uint32_t tokens[2] = {token_of_row(w, lane_row(0)), token_of_row(w, lane_row(1))};
    size_t upper = output_row<SIZE>(w, tokens[0]), lower = output_row<SIZE>(w, tokens[1]);
    QueryStats stats = {};
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) {
        uint32_t y[4];
        load_operand(dy[i], gradients + upper + i * 16, gradients + lower + i * 16);
        load_operand(y, results + upper + i * 16, results + lower + i * 16);
        UNROLL
        for (int j = 0; j < 4; j++) {
            stats.dots[j % 2] +=
                low<T>(dy[i][j]) * low<T>(y[j]) + high<T>(dy[i][j]) * high<T>(y[j]);
        }
    }
    UNROLL
    for (int half = 0; half < 2; half++) {
        float& dot = stats.dots[half];
        dot += shuffle_xor(dot, 1);
        dot += shuffle_xor(dot, 2);
        stats.logs[half] = log_of_query(a, w, tokens[half], slope);
        bool own = lane_index() % 4 == 0 && lane_row(half) < w.tile.count;
        if (own) a.dot[stat_of(w, tokens[half])] = dot;
    }
    return stats;
}

// The same for all queries of a step, by the first 2 STEP threads of the block: logarithms by the
// first STEP, dot products by the next. Queries that do not exist have no weights.
template <int STEP>
DEVICE float load_query_stat(const AttentionTrainArgs& a, const Work& w, uint32_t first,
                             float slope) {
    uint32_t token = first + threadIdx.x % STEP;
    bool valid = token < w.tile.sequence_end;
    if (threadIdx.x >= STEP) return valid ? a.dot[stat_of(w, token)] : 0;
    return valid ? log_of_query(a, w, token, slope) : INFINITY;
}

// Turns the scores of queries (rows) and N keys into probabilities. `first` is the first key's
// token, relative to the tile. If `masked`, some query does not attend to all keys.
template <int N>
DEVICE void probabilities_by_query(float* scores, const QueryStats& stats, int first, bool masked,
                                   float scale, float slope) {
    int own = first + 2 * (lane_index() % 4); // this lane's first key
    float base = slope * static_cast<float>(own);
    float relative[2] = {stats.logs[0] - base, stats.logs[1] - base};
    UNROLL
    for (int i = 0; i < N / 2; i++) {
        int column = i / 4 * 8 + i % 2, half = i / 2 % 2;
        float bias = slope * static_cast<float>(column) - relative[half];
        scores[i] = exp2_approx(scores[i] * scale + bias);
        if (masked && own + column > static_cast<int>(lane_row(half))) scores[i] = 0;
    }
}
// Turns gradients of probabilities into those of scores, without their scale.
template <int N>
DEVICE void gradients_by_query(float* gradients, const float* p, const QueryStats& stats) {
    UNROLL
    for (int i = 0; i < N / 2; i++) {
        gradients[i] = p[i] * (gradients[i] - stats.dots[i / 2 % 2]);
    }
}

// The same for scores of keys (rows) and N queries. `stats` are those of the queries in shared
// memory, `biases` ALiBi's of this lane's keys.
template <int N>
DEVICE void probabilities_by_key(float* scores, const float* stats, const float (&biases)[2],
                                 int first, bool masked, float scale) {
    int t = lane_index() % 4;
    UNROLL
    for (int n = 0; n < N / 8; n++) {
        Float2 logs = *reinterpret_cast<const Float2*>(stats + n * 8 + 2 * t);
        UNROLL
        for (int i = 0; i < 4; i++) {
            float& x = scores[4 * n + i];
            int column = first + n * 8 + 2 * t + i % 2;
            x = exp2_approx(x * scale + (biases[i / 2] - logs.v[i % 2]));
            if (masked && static_cast<int>(lane_row(i / 2)) > column) x = 0;
        }
    }
}
template <int N>
DEVICE void gradients_by_key(float* gradients, const float* p, const float* stats) {
    UNROLL
    for (int n = 0; n < N / 8; n++) {
        int column = n * 8 + 2 * (lane_index() % 4);
        Float2 dots = *reinterpret_cast<const Float2*>(stats + N + column);
        UNROLL
        for (int i = 4 * n; i < 4 * n + 4; i++) {
            gradients[i] = p[i] * (gradients[i] - dots.v[i % 2]);
        }
    }
}

// Writes the gradients of queries (part 0), keys (1) or values (2).
template <class T, int SIZE>
DEVICE void store_gradients(const AttentionTrainArgs& a, const Work& w, int part,
                            const float* sums) {
    float factor = part == 2 ? 1 : 1 / sqrtf(static_cast<float>(SIZE));
    UNROLL
    for (int half = 0; half < 2; half++) {
        uint32_t row = lane_row(half);
        if (row >= w.tile.count) continue;
        size_t at = qkv_row<SIZE>(w, part, w.tile.first + row);
        store_row<T, SIZE>(a.dqkv, at, sums, half, factor);
    }
}
