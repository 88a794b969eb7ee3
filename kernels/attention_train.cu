// Causal attention with ALiBi over packed sequences, forward and backward (after FlashAttention-2,
// Dao 2023), on every GPU since Ampere.
//
//   qkv [tokens, head, 3, size], y [tokens, head, size] and their gradients in 16 bits
//   lse [tokens, head] in f32: logarithm of the sum of exponentials of a query's scores
//   score = q k / sqrt(size) + slope * (position of the key - position of the query)
//
// FLOPs for each query and each key that it attends to: 4 * size forward, 14 * size backward, of
// which 4 * size are computed twice. Least bytes: all arguments once, and for each 64 tokens the
// keys and values before them (forward and dq) or the queries and gradients behind them (dkv).
// A block takes one head of 64 tokens of a sequence, in 4 warps of 16, and walks through the tokens
// on the other side of the scores step by step, with cp.async of the next step during the
// computation of this one. The backward pass is two kernels, so that every gradient is summed in
// registers in the order of the tokens, without atomics: blocks of one own queries (dq), blocks of
// the other own keys (dkv). Both compute the probabilities again from `lse`. The kernel for keys
// has the scores transposed, keys by queries, so that probabilities and their gradients are
// operands as they lie in the accumulators. The host sorts tiles by their work, the most first.
// Rows in shared memory are 16 bytes longer than a head, so that ldmatrix has no bank conflicts.
#include "attention_tiles.cuh"
#include "memory.cuh"
#include "mma.cuh"

constexpr int WARPS = ATTENTION_TRAIN_WARPS; // each has 16 tokens
constexpr int TILE = ATTENTION_TRAIN_TILE;
constexpr int STEP = ATTENTION_TRAIN_STEP;
constexpr float LN_2 = 0.693147181f;
static_assert(16 * WARPS == TILE, "all tokens have a warp");
static_assert(TILE == ATTENTION_STEP, "a query's steps begin where tiles do");

template <int SIZE>
DEVICE constexpr int row_bytes() {
    return SIZE * 2 + 16;
}

// What a block works on.
struct Work {
    uint32_t head, heads;
    AttentionTrainTile tile;
};
DEVICE Work work_of_block(const AttentionTrainArgs& a) {
    return {blockIdx.x, a.heads, a.tiles[blockIdx.y]};
}

// The row of a token in query (0), key (1) or value (2) of the head.
template <class T, int SIZE>
DEVICE size_t qkv_row(const Work& w, int part, uint32_t token) {
    return ((static_cast<size_t>(token) * w.heads + w.head) * 3 + part) * SIZE;
}
// The row of a token in an output of the head.
template <class T, int SIZE>
DEVICE size_t output_row(const Work& w, uint32_t token) {
    return (static_cast<size_t>(token) * w.heads + w.head) * SIZE;
}

// Starts copies of ROWS rows, the first at `first` and each `stride` elements behind the one
// before, with zeros from row `count` on.
template <class T, int SIZE, int ROWS>
DEVICE void load_rows(char* shared, const void* matrix, size_t first, uint32_t stride,
                      uint32_t count) {
    constexpr int CHUNKS = SIZE / 8;
    const char* rows = opaque_address(static_cast<const T*>(matrix) + first);
    UNROLL
    for (uint32_t i = threadIdx.x; i < ROWS * CHUNKS; i += WARPS * WARP) {
        uint32_t r = i / CHUNKS, c = i % CHUNKS;
        bool valid = r < count;
        uint32_t offset = (valid ? r : 0) * stride * sizeof(T) + c * 16;
        cp_async(shared + r * row_bytes<SIZE>() + c * 16, rows + offset, valid);
    }
}
// The same of keys and values.
template <class T, int SIZE, int ROWS>
DEVICE void load_keys_values(char* shared, const AttentionTrainArgs& a, const Work& w,
                             uint32_t first, uint32_t count) {
    uint32_t stride = w.heads * 3 * SIZE;
    load_rows<T, SIZE, ROWS>(shared, a.qkv, qkv_row<T, SIZE>(w, 1, first), stride, count);
    load_rows<T, SIZE, ROWS>(shared + ROWS * row_bytes<SIZE>(), a.qkv,
                             qkv_row<T, SIZE>(w, 2, first), stride, count);
}
// The same of queries and gradients of their results.
template <class T, int SIZE, int ROWS>
DEVICE void load_queries_gradients(char* shared, const AttentionTrainArgs& a, const Work& w,
                                   uint32_t first, uint32_t count) {
    uint32_t stride = w.heads * SIZE;
    load_rows<T, SIZE, ROWS>(shared, a.qkv, qkv_row<T, SIZE>(w, 0, first), 3 * stride, count);
    load_rows<T, SIZE, ROWS>(shared + ROWS * row_bytes<SIZE>(), a.dy, output_row<T, SIZE>(w, first),
                             stride, count);
}

// The pairs of columns that this lane has of an operand with 16 columns: two of the row at
// `upper`, two of that at `lower`.
template <class T>
DEVICE void load_operand(uint32_t (&out)[4], const T* upper, const T* lower) {
    int t = lane_index() % 4;
    UNROLL
    for (int j = 0; j < 4; j++) {
        const T* row = j % 2 == 0 ? upper : lower;
        out[j] = *reinterpret_cast<const uint32_t*>(row + j / 2 * 8 + 2 * t);
    }
}

// c += a b^T for a = [16, 16] in registers and b = [N, 16], columns of rows in shared memory.
template <class T, int SIZE, int N>
DEVICE void mma_abt(float (&c)[N / 8][4], const uint32_t (&a)[4], const char* b) {
    int lane = lane_index();
    UNROLL
    for (int n = 0; n < N / 16; n++) {
        uint32_t pairs[4];
        ldmatrix_x4(pairs, b + (n * 16 + lane / 16 * 8 + lane % 8) * row_bytes<SIZE>() +
                               lane / 8 % 2 * 16);
        uint32_t b0[2] = {pairs[0], pairs[1]}, b1[2] = {pairs[2], pairs[3]};
        mma_m16n8k16<T>(c[2 * n], a, b0);
        mma_m16n8k16<T>(c[2 * n + 1], a, b1);
    }
}

// c += a b for a = [16, 16] in registers and b = [16, SIZE], rows in shared memory.
template <class T, int SIZE>
DEVICE void mma_ab(float (&c)[SIZE / 8][4], const uint32_t (&a)[4], const char* b) {
    int lane = lane_index();
    UNROLL
    for (int d = 0; d < SIZE / 16; d++) {
        uint32_t pairs[4];
        ldmatrix_x4_trans(pairs, b + lane % 16 * row_bytes<SIZE>() + (d * 2 + lane / 16) * 16);
        uint32_t b0[2] = {pairs[0], pairs[1]}, b1[2] = {pairs[2], pairs[3]};
        mma_m16n8k16<T>(c[2 * d], a, b0);
        mma_m16n8k16<T>(c[2 * d + 1], a, b1);
    }
}

// Rounds 16 columns of accumulators to an operand.
template <class T>
DEVICE void pack_operand(uint32_t (&out)[4], const float (&left)[4], const float (&right)[4]) {
    out[0] = pack<T>(left[0], left[1]);
    out[1] = pack<T>(left[2], left[3]);
    out[2] = pack<T>(right[0], right[1]);
    out[3] = pack<T>(right[2], right[3]);
}

// Writes this lane's part of one row of accumulators (`half` 0 or 1), multiplied by `factor`.
template <class T, int SIZE>
DEVICE void store_row(T* row, const float (&c)[SIZE / 8][4], int half, float factor) {
    int t = lane_index() % 4;
    UNROLL
    for (int d = 0; d < SIZE / 8; d++) {
        *reinterpret_cast<uint32_t*>(row + d * 8 + 2 * t) =
            pack<T>(c[d][2 * half] * factor, c[d][2 * half + 1] * factor);
    }
}

// The factor of scores whose exponentials have base 2.
template <int SIZE>
DEVICE float score_scale() {
    return LOG2_E / sqrtf(static_cast<float>(SIZE));
}

template <class T, int SIZE>
DEVICE void attention_train_forward(const AttentionTrainArgs& a) {
    constexpr int STAGE = 2 * TILE * row_bytes<SIZE>();
    char* shared = shared_memory();
    griddep_wait();
    const Work w = work_of_block(a);
    const AttentionTrainTile& tile = w.tile;
    uint32_t start = tile.sequence_start, keys = tile.first + tile.count - start;
    uint32_t steps = (keys + TILE - 1) / TILE;
    load_keys_values<T, SIZE, TILE>(shared, a, w, start, keys);
    cp_async_commit_group();
    // A lane works on two of this warp's 16 queries. Rows beyond the last query compute the last
    // one again, and warps that have no other leave it to them.
    uint32_t first_row = warp_index() * 16, r0 = first_row + lane_index() / 4, r1 = r0 + 8;
    uint32_t last = tile.count - 1;
    uint32_t tokens[2] = {tile.first + (r0 < last ? r0 : last),
                          tile.first + (r1 < last ? r1 : last)};
    uint32_t positions[2] = {tokens[0] - start, tokens[1] - start};
    const T* qkv = static_cast<const T*>(a.qkv);
    uint32_t q[SIZE / 16][4];
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) {
        load_operand(q[i], qkv + qkv_row<T, SIZE>(w, 0, tokens[0]) + i * 16,
                     qkv + qkv_row<T, SIZE>(w, 0, tokens[1]) + i * 16);
    }
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    float y[SIZE / 8][4] = {};
    SoftmaxState softmax;
    for (uint32_t s = 0; s < steps; s++) {
        const char* k = shared + s % 2 * STAGE;
        const char* v = k + TILE * row_bytes<SIZE>();
        // Behind the barrier this step is there, and all warps have read the one before, whose
        // place the next one takes.
        cp_async_wait_group<0>();
        block_sync();
        if (s + 1 < steps) {
            uint32_t next = (s + 1) * TILE;
            load_keys_values<T, SIZE, TILE>(shared + (s + 1) % 2 * STAGE, a, w, start + next,
                                            keys - next);
        }
        cp_async_commit_group();
        if (first_row > last) continue;
        float scores[TILE / 8][4] = {};
        UNROLL
        for (int i = 0; i < SIZE / 16; i++) mma_abt<T, SIZE, TILE>(scores, q[i], k + i * 32);
        float rescale[2];
        // only the queries of the last step do not attend to all of it
        online_softmax(&scores[0][0], softmax, rescale, positions, s * TILE, s + 1 == steps, scale,
                       slope);
        if (warp_any(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
            UNROLL
            for (int d = 0; d < SIZE / 8; d++) {
                UNROLL
                for (int i = 0; i < 4; i++) y[d][i] *= rescale[i / 2];
            }
        }
        UNROLL
        for (int n = 0; n < TILE / 16; n++) {
            uint32_t p[4];
            pack_operand<T>(p, scores[2 * n], scores[2 * n + 1]);
            mma_ab<T, SIZE>(y, p, v + n * 16 * row_bytes<SIZE>());
        }
    }
    griddep_launch_dependents();
    UNROLL
    for (int half = 0; half < 2; half++) {
        // the weights of a query are spread over four neighbouring lanes
        float sum = softmax.sum[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        uint32_t row = first_row + lane_index() / 4 + 8 * half, token = tile.first + row;
        if (row > last) continue;
        if (lane_index() % 4 == 0) {
            a.lse[static_cast<size_t>(token) * w.heads + w.head] =
                softmax.max[half] * LN_2 + logf(sum);
        }
        T* to = static_cast<T*>(a.y) + output_row<T, SIZE>(w, token);
        store_row<T, SIZE>(to, y, half, 1.0f / sum); // a division takes some ten instructions
    }
}

// Gradients of queries, and the dot products that the kernel for keys needs.
template <class T, int SIZE>
DEVICE void attention_train_dq(const AttentionTrainArgs& a) {
    constexpr int STAGE = 2 * STEP * row_bytes<SIZE>();
    char* shared = shared_memory();
    griddep_wait();
    const Work w = work_of_block(a);
    const AttentionTrainTile& tile = w.tile;
    uint32_t start = tile.sequence_start, keys = tile.first + tile.count - start;
    uint32_t steps = (keys + STEP - 1) / STEP;
    load_keys_values<T, SIZE, STEP>(shared, a, w, start, keys);
    cp_async_commit_group();
    // rows beyond the last query compute the last one again
    int t = lane_index() % 4;
    uint32_t first_row = warp_index() * 16, r0 = first_row + lane_index() / 4, r1 = r0 + 8;
    uint32_t last = tile.count - 1;
    uint32_t tokens[2] = {tile.first + (r0 < last ? r0 : last),
                          tile.first + (r1 < last ? r1 : last)};
    const T *qkv = static_cast<const T*>(a.qkv), *dys = static_cast<const T*>(a.dy);
    const T* ys = static_cast<const T*>(a.y);
    size_t outputs[2] = {output_row<T, SIZE>(w, tokens[0]), output_row<T, SIZE>(w, tokens[1])};
    uint32_t q[SIZE / 16][4], dy[SIZE / 16][4];
    float dot[2] = {};
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) {
        load_operand(q[i], qkv + qkv_row<T, SIZE>(w, 0, tokens[0]) + i * 16,
                     qkv + qkv_row<T, SIZE>(w, 0, tokens[1]) + i * 16);
        load_operand(dy[i], dys + outputs[0] + i * 16, dys + outputs[1] + i * 16);
        uint32_t y[4];
        load_operand(y, ys + outputs[0] + i * 16, ys + outputs[1] + i * 16);
        UNROLL
        for (int j = 0; j < 4; j++) {
            dot[j % 2] += low<T>(dy[i][j]) * low<T>(y[j]) + high<T>(dy[i][j]) * high<T>(y[j]);
        }
    }
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    // What a query subtracts from the logarithms of its weights, if the key's part of ALiBi is
    // relative to the first token of the tile: small numbers wherever weights are not negligible.
    float logs[2];
    UNROLL
    for (int half = 0; half < 2; half++) {
        dot[half] += shuffle_xor(dot[half], 1);
        dot[half] += shuffle_xor(dot[half], 2);
        size_t at = static_cast<size_t>(tokens[half]) * w.heads + w.head;
        logs[half] = a.lse[at] * LOG2_E + slope * static_cast<float>(tokens[half] - tile.first);
        if (t == 0 && first_row + lane_index() / 4 + 8 * half <= last) a.dot[at] = dot[half];
    }
    float dq[SIZE / 8][4] = {};
    for (uint32_t s = 0; s < steps; s++) {
        const char* k = shared + s % 2 * STAGE;
        const char* v = k + STEP * row_bytes<SIZE>();
        // as in the forward pass
        cp_async_wait_group<0>();
        block_sync();
        if (s + 1 < steps) {
            uint32_t next = (s + 1) * STEP;
            load_keys_values<T, SIZE, STEP>(shared + (s + 1) % 2 * STAGE, a, w, start + next,
                                            keys - next);
        }
        cp_async_commit_group();
        // of the step, relative to the first query of the warp
        int first_key = static_cast<int>(start + s * STEP - tile.first - first_row);
        if (first_row > last || first_key > 15) continue;
        float scores[STEP / 8][4] = {}, gradients[STEP / 8][4] = {};
        UNROLL
        for (int i = 0; i < SIZE / 16; i++) {
            mma_abt<T, SIZE, STEP>(scores, q[i], k + i * 32);
            mma_abt<T, SIZE, STEP>(gradients, dy[i], v + i * 32);
        }
        int own = first_key + 2 * t; // this lane's first key
        float base = slope * static_cast<float>(own + static_cast<int>(first_row));
        float relative[2] = {logs[0] - base, logs[1] - base};
        bool masked = first_key + STEP > 1;
        UNROLL
        for (int n = 0; n < STEP / 8; n++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                int column = n * 8 + i % 2, row = lane_index() / 4 + i / 2 * 8;
                float bias = slope * static_cast<float>(column) - relative[i / 2];
                float p = exp2_approx(scores[n][i] * scale + bias);
                if (masked && own + column > row) p = 0;
                gradients[n][i] = p * (gradients[n][i] - dot[i / 2]);
            }
        }
        UNROLL
        for (int n = 0; n < STEP / 16; n++) {
            uint32_t ds[4];
            pack_operand<T>(ds, gradients[2 * n], gradients[2 * n + 1]);
            mma_ab<T, SIZE>(dq, ds, k + n * 16 * row_bytes<SIZE>());
        }
    }
    griddep_launch_dependents();
    UNROLL
    for (int half = 0; half < 2; half++) {
        uint32_t row = first_row + lane_index() / 4 + 8 * half;
        if (row > last) continue;
        T* to = static_cast<T*>(a.dqkv) + qkv_row<T, SIZE>(w, 0, tile.first + row);
        store_row<T, SIZE>(to, dq, half, scale / LOG2_E);
    }
}

// What the keys of a tile have to know of a query: the logarithm that it subtracts from those of
// its weights, as in the kernel for queries, and its dot product. The first STEP threads ask for
// the one and the next STEP for the other. Queries that do not exist have no weights.
DEVICE float load_query_stats(const AttentionTrainArgs& a, const Work& w, uint32_t first,
                              float slope) {
    uint32_t token = first + threadIdx.x % STEP;
    bool valid = token < w.tile.sequence_end;
    size_t at = static_cast<size_t>(valid ? token : w.tile.first) * w.heads + w.head;
    if (threadIdx.x >= STEP) return valid ? a.dot[at] : 0;
    return valid ? a.lse[at] * LOG2_E + slope * static_cast<float>(token - w.tile.first) : INFINITY;
}

// Gradients of keys and values.
template <class T, int SIZE>
DEVICE void attention_train_dkv(const AttentionTrainArgs& a) {
    constexpr int STAGE = 2 * STEP * row_bytes<SIZE>();
    char* k = shared_memory();
    char* v = k + TILE * row_bytes<SIZE>();
    char* stages = v + TILE * row_bytes<SIZE>();
    float* stats = reinterpret_cast<float*>(stages + 2 * STAGE); // [stage, 2, query]
    griddep_wait();
    const Work w = work_of_block(a);
    const AttentionTrainTile& tile = w.tile;
    uint32_t queries = tile.sequence_end - tile.first;
    uint32_t steps = (queries + STEP - 1) / STEP;
    load_keys_values<T, SIZE, TILE>(k, a, w, tile.first, tile.count);
    load_queries_gradients<T, SIZE, STEP>(stages, a, w, tile.first, queries);
    cp_async_commit_group();
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    bool asks = threadIdx.x < 2 * STEP;
    if (asks) stats[threadIdx.x] = load_query_stats(a, w, tile.first, slope);
    int lane = lane_index(), g = lane / 4, t = lane % 4;
    int first_row = warp_index() * 16; // keys from `count` on are zeros, and no query sees them
    float biases[2] = {slope * static_cast<float>(first_row + g),
                       slope * static_cast<float>(first_row + g + 8)};
    // where this lane's row of ldmatrix begins, in the keys and in the values
    const char* key_rows = k + (first_row + lane % 16) * row_bytes<SIZE>() + lane / 16 * 16;
    const char* value_rows = key_rows + TILE * row_bytes<SIZE>();
    float dk[SIZE / 8][4] = {}, dv[SIZE / 8][4] = {};
    for (uint32_t s = 0; s < steps; s++) {
        const char* q = stages + s % 2 * STAGE;
        const char* dy = q + STEP * row_bytes<SIZE>();
        // as in the forward pass
        cp_async_wait_group<0>();
        block_sync();
        float next_stats = 0;
        if (s + 1 < steps) {
            uint32_t next = (s + 1) * STEP;
            load_queries_gradients<T, SIZE, STEP>(stages + (s + 1) % 2 * STAGE, a, w,
                                                  tile.first + next, queries - next);
            if (asks) next_stats = load_query_stats(a, w, tile.first + next, slope);
        }
        cp_async_commit_group();
        // of the step, relative to the first key of the warp
        int first_query = static_cast<int>(s * STEP) - first_row;
        if (first_row < static_cast<int>(tile.count) && first_query + STEP > 0) {
            float scores[STEP / 8][4] = {}, gradients[STEP / 8][4] = {};
            UNROLL
            for (int i = 0; i < SIZE / 16; i++) {
                uint32_t operand[4];
                ldmatrix_x4(operand, key_rows + i * 32);
                mma_abt<T, SIZE, STEP>(scores, operand, q + i * 32);
                ldmatrix_x4(operand, value_rows + i * 32);
                mma_abt<T, SIZE, STEP>(gradients, operand, dy + i * 32);
            }
            bool masked = first_query < 15;
            UNROLL
            for (int n = 0; n < STEP / 8; n++) {
                const float* own = stats + s % 2 * 2 * STEP + n * 8 + 2 * t;
                Float2 logs = *reinterpret_cast<const Float2*>(own);
                Float2 dots = *reinterpret_cast<const Float2*>(own + STEP);
                UNROLL
                for (int i = 0; i < 4; i++) {
                    int column = first_query + n * 8 + 2 * t + i % 2, row = g + i / 2 * 8;
                    float p = exp2_approx(scores[n][i] * scale + (biases[i / 2] - logs.v[i % 2]));
                    if (masked && row > column) p = 0;
                    scores[n][i] = p;
                    gradients[n][i] = p * (gradients[n][i] - dots.v[i % 2]);
                }
            }
            UNROLL
            for (int n = 0; n < STEP / 16; n++) {
                uint32_t operand[4];
                pack_operand<T>(operand, scores[2 * n], scores[2 * n + 1]);
                mma_ab<T, SIZE>(dv, operand, dy + n * 16 * row_bytes<SIZE>());
                pack_operand<T>(operand, gradients[2 * n], gradients[2 * n + 1]);
                mma_ab<T, SIZE>(dk, operand, q + n * 16 * row_bytes<SIZE>());
            }
        }
        if (asks) stats[(s + 1) % 2 * 2 * STEP + threadIdx.x] = next_stats;
    }
    griddep_launch_dependents();
    UNROLL
    for (int half = 0; half < 2; half++) {
        uint32_t row = first_row + g + 8 * half;
        if (row >= tile.count) continue;
        T* dqkv = static_cast<T*>(a.dqkv);
        store_row<T, SIZE>(dqkv + qkv_row<T, SIZE>(w, 1, tile.first + row), dk, half,
                           scale / LOG2_E);
        store_row<T, SIZE>(dqkv + qkv_row<T, SIZE>(w, 2, tile.first + row), dv, half, 1);
    }
}

#define ATTENTION_TRAIN(pass, T, SIZE, blocks)                                \
    KERNEL_SHARED(attention_train_##pass##_##T##_##SIZE, WARPS* WARP, blocks) \
    (AttentionTrainArgs a) { attention_train_##pass<T, SIZE>(a); }            \
    EXPORT(attention_train_##pass##_##T##_##SIZE)
// As many blocks as share a multiprocessor without spilled registers: one waits while others
// compute.
#define ATTENTION_TRAIN_ALL(T)          \
    ATTENTION_TRAIN(forward, T, 32, 4)  \
    ATTENTION_TRAIN(forward, T, 64, 3)  \
    ATTENTION_TRAIN(forward, T, 80, 3)  \
    ATTENTION_TRAIN(forward, T, 96, 3)  \
    ATTENTION_TRAIN(forward, T, 128, 2) \
    ATTENTION_TRAIN(dq, T, 32, 4)       \
    ATTENTION_TRAIN(dq, T, 64, 4)       \
    ATTENTION_TRAIN(dq, T, 80, 3)       \
    ATTENTION_TRAIN(dq, T, 96, 3)       \
    ATTENTION_TRAIN(dq, T, 128, 2)      \
    ATTENTION_TRAIN(dkv, T, 32, 4)      \
    ATTENTION_TRAIN(dkv, T, 64, 4)      \
    ATTENTION_TRAIN(dkv, T, 80, 3)      \
    ATTENTION_TRAIN(dkv, T, 96, 2)      \
    ATTENTION_TRAIN(dkv, T, 128, 2)
ATTENTION_TRAIN_ALL(bf16)
ATTENTION_TRAIN_ALL(f16)
