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
#include "attention_train.cuh"
#include "mma.cuh"

constexpr int STEP = ATTENTION_TRAIN_STEP;

template <int SIZE>
DEVICE constexpr int row_bytes() {
    return SIZE * 2 + 16;
}

// Starts copies of ROWS rows, the first at `first` and each `stride` elements behind the one
// before, with zeros from row `count` on. Four threads share a row, so that addresses differ by
// constants and take few registers.
template <class T, int SIZE, int ROWS>
DEVICE void load_rows(char* shared, const void* matrix, size_t first, uint32_t stride,
                      uint32_t count) {
    constexpr int CHUNKS = SIZE / 8, ROWS_AT_A_TIME = THREADS / 4;
    const char* rows = opaque_address(static_cast<const T*>(matrix) + first);
    uint32_t row = threadIdx.x / 4, column = threadIdx.x % 4;
    UNROLL
    for (int i = 0; i < ROWS / ROWS_AT_A_TIME; i++) {
        uint32_t r = row + i * ROWS_AT_A_TIME;
        bool valid = r < count;
        const char* from = rows + (valid ? r : 0) * stride * sizeof(T) + column * 16;
        char* to = shared + r * row_bytes<SIZE>() + column * 16;
        UNROLL
        for (int c = 0; c < CHUNKS; c += 4) {
            if (c + 4 <= CHUNKS || c + column < CHUNKS) cp_async(to + c * 16, from + c * 16, valid);
        }
    }
}
// The same of keys and values.
template <class T, int SIZE, int ROWS>
DEVICE void load_keys_values(char* shared, const AttentionTrainArgs& a, const Work& w,
                             uint32_t first, uint32_t count) {
    uint32_t stride = w.heads * 3 * SIZE;
    load_rows<T, SIZE, ROWS>(shared, a.qkv, qkv_row<SIZE>(w, 1, first), stride, count);
    load_rows<T, SIZE, ROWS>(shared + ROWS * row_bytes<SIZE>(), a.qkv, qkv_row<SIZE>(w, 2, first),
                             stride, count);
}
// The same of queries and gradients of their results.
template <class T, int SIZE, int ROWS>
DEVICE void load_queries_gradients(char* shared, const AttentionTrainArgs& a, const Work& w,
                                   uint32_t first, uint32_t count) {
    uint32_t stride = w.heads * SIZE;
    load_rows<T, SIZE, ROWS>(shared, a.qkv, qkv_row<SIZE>(w, 0, first), 3 * stride, count);
    load_rows<T, SIZE, ROWS>(shared + ROWS * row_bytes<SIZE>(), a.dy, output_row<SIZE>(w, first),
                             stride, count);
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

template <class T, int SIZE>
DEVICE void attention_train_forward(const AttentionTrainArgs& a) {
    constexpr int STAGE = 2 * TILE * row_bytes<SIZE>();
    char* shared = shared_memory();
    griddep_wait();
    const Work w = work_of_block(a);
    uint32_t start = w.tile.sequence_start, keys = w.tile.first + w.tile.count - start;
    load_keys_values<T, SIZE, TILE>(shared, a, w, start, keys);
    cp_async_commit_group();
    uint32_t q[SIZE / 16][4];
    load_train_queries<T, SIZE>(q, a, w);
    uint32_t position = w.tile.first - start + lane_row(0), positions[2] = {position, position + 8};
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    float y[SIZE / 8][4] = {};
    SoftmaxState softmax;
    for (uint32_t first = 0; first < keys; first += TILE) {
        const char* k = shared + first / TILE % 2 * STAGE;
        const char* v = k + TILE * row_bytes<SIZE>();
        // Behind the barrier this step is there, and all warps have read the one before, whose
        // place the next one takes.
        cp_async_wait_group<0>();
        block_sync();
        if (first + TILE < keys) {
            uint32_t next = first + TILE;
            load_keys_values<T, SIZE, TILE>(shared + next / TILE % 2 * STAGE, a, w, start + next,
                                            keys - next);
        }
        cp_async_commit_group();
        float scores[TILE / 8][4] = {};
        UNROLL
        for (int i = 0; i < SIZE / 16; i++) mma_abt<T, SIZE, TILE>(scores, q[i], k + i * 32);
        float rescale[2];
        // only the last step has keys behind a query
        online_softmax(&scores[0][0], softmax, rescale, positions, first, first + TILE >= keys,
                       scale, slope);
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
            pack_operand<T>(p, &scores[0][0] + 8 * n);
            mma_ab<T, SIZE>(y, p, v + n * 16 * row_bytes<SIZE>());
        }
    }
    griddep_launch_dependents();
    store_attended<T, SIZE>(a, w, &y[0][0], softmax);
}

// Gradients of queries, and the dot products that the kernel for keys needs.
template <class T, int SIZE>
DEVICE void attention_train_dq(const AttentionTrainArgs& a) {
    constexpr int STAGE = 2 * STEP * row_bytes<SIZE>();
    char* shared = shared_memory();
    griddep_wait();
    const Work w = work_of_block(a);
    uint32_t start = w.tile.sequence_start, keys = w.tile.first + w.tile.count - start;
    uint32_t steps = (keys + STEP - 1) / STEP;
    load_keys_values<T, SIZE, STEP>(shared, a, w, start, keys);
    cp_async_commit_group();
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    uint32_t q[SIZE / 16][4], dy[SIZE / 16][4];
    load_train_queries<T, SIZE>(q, a, w);
    QueryStats stats = load_gradients<T, SIZE>(dy, a, w, slope);
    int first_row = warp_index() * 16;
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
        // The first key, relative to the tile. Warps skip keys that are behind all of their
        // queries.
        int first = static_cast<int>(start + s * STEP - w.tile.first);
        if (first_row >= static_cast<int>(w.tile.count) || first >= first_row + 16) continue;
        float scores[STEP / 8][4] = {}, gradients[STEP / 8][4] = {};
        UNROLL
        for (int i = 0; i < SIZE / 16; i++) {
            mma_abt<T, SIZE, STEP>(scores, q[i], k + i * 32);
            mma_abt<T, SIZE, STEP>(gradients, dy[i], v + i * 32);
        }
        probabilities_by_query<STEP>(&scores[0][0], stats, first, first + STEP > first_row + 1,
                                     scale, slope);
        gradients_by_query<STEP>(&gradients[0][0], &scores[0][0], stats);
        UNROLL
        for (int n = 0; n < STEP / 16; n++) {
            uint32_t ds[4];
            pack_operand<T>(ds, &gradients[0][0] + 8 * n);
            mma_ab<T, SIZE>(dq, ds, k + n * 16 * row_bytes<SIZE>());
        }
    }
    griddep_launch_dependents();
    store_gradients<T, SIZE>(a, w, 0, &dq[0][0]);
}

// Gradients of keys and values.
template <class T, int SIZE>
DEVICE void attention_train_dkv(const AttentionTrainArgs& a) {
    constexpr int STAGE = 2 * STEP * row_bytes<SIZE>();
    char* k = shared_memory();
    char* v = k + TILE * row_bytes<SIZE>();
    char* stages = v + TILE * row_bytes<SIZE>();
    float* all_stats = reinterpret_cast<float*>(stages + 2 * STAGE); // [stage, 2, query]
    griddep_wait();
    const Work w = work_of_block(a);
    uint32_t first = w.tile.first, queries = w.tile.sequence_end - first;
    uint32_t steps = (queries + STEP - 1) / STEP;
    // keys from `count` on are zeros, and no query attends to them
    load_keys_values<T, SIZE, TILE>(k, a, w, first, w.tile.count);
    load_queries_gradients<T, SIZE, STEP>(stages, a, w, first, queries);
    cp_async_commit_group();
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    bool loads_stats = threadIdx.x < 2 * STEP;
    if (loads_stats) all_stats[threadIdx.x] = load_query_stat<STEP>(a, w, first, slope);
    int lane = lane_index(), first_row = warp_index() * 16;
    float biases[2] = {slope * static_cast<float>(lane_row(0)),
                       slope * static_cast<float>(lane_row(1))};
    // what this lane gives the address of for ldmatrix, in keys and values
    const char* key_row = k + (first_row + lane % 16) * row_bytes<SIZE>() + lane / 16 * 16;
    const char* value_row = key_row + TILE * row_bytes<SIZE>();
    float dk[SIZE / 8][4] = {}, dv[SIZE / 8][4] = {};
    for (uint32_t s = 0; s < steps; s++) {
        const char* q = stages + s % 2 * STAGE;
        const char* dy = q + STEP * row_bytes<SIZE>();
        const float* stats = all_stats + s % 2 * 2 * STEP;
        // as in the forward pass
        cp_async_wait_group<0>();
        block_sync();
        float next_stat = 0;
        if (s + 1 < steps) {
            uint32_t next = (s + 1) * STEP;
            load_queries_gradients<T, SIZE, STEP>(stages + (s + 1) % 2 * STAGE, a, w, first + next,
                                                  queries - next);
            if (loads_stats) next_stat = load_query_stat<STEP>(a, w, first + next, slope);
        }
        cp_async_commit_group();
        // the first query, relative to the tile; warps skip queries before all of their keys
        int first_query = static_cast<int>(s * STEP);
        if (first_row < static_cast<int>(w.tile.count) && first_query + STEP > first_row) {
            float scores[STEP / 8][4] = {}, gradients[STEP / 8][4] = {};
            UNROLL
            for (int i = 0; i < SIZE / 16; i++) {
                uint32_t operand[4];
                ldmatrix_x4(operand, key_row + i * 32);
                mma_abt<T, SIZE, STEP>(scores, operand, q + i * 32);
                ldmatrix_x4(operand, value_row + i * 32);
                mma_abt<T, SIZE, STEP>(gradients, operand, dy + i * 32);
            }
            probabilities_by_key<STEP>(&scores[0][0], stats, biases, first_query,
                                       first_query < first_row + 15, scale);
            gradients_by_key<STEP>(&gradients[0][0], &scores[0][0], stats);
            UNROLL
            for (int n = 0; n < STEP / 16; n++) {
                uint32_t operand[4];
                pack_operand<T>(operand, &scores[0][0] + 8 * n);
                mma_ab<T, SIZE>(dv, operand, dy + n * 16 * row_bytes<SIZE>());
                pack_operand<T>(operand, &gradients[0][0] + 8 * n);
                mma_ab<T, SIZE>(dk, operand, q + n * 16 * row_bytes<SIZE>());
            }
        }
        if (loads_stats) all_stats[(s + 1) % 2 * 2 * STEP + threadIdx.x] = next_stat;
    }
    griddep_launch_dependents();
    store_gradients<T, SIZE>(a, w, 1, &dk[0][0]);
    store_gradients<T, SIZE>(a, w, 2, &dv[0][0]);
}

#define ATTENTION_TRAIN(pass, T, SIZE, blocks)                            \
    KERNEL_SHARED(attention_train_##pass##_##T##_##SIZE, THREADS, blocks) \
    (AttentionTrainArgs a) { attention_train_##pass<T, SIZE>(a); }        \
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
