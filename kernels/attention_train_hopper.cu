// Causal attention with ALiBi over packed sequences, forward and backward, on Hopper: what
// attention_train.cu computes, from and to the same memory.
//
// A block is one warpgroup with one head of 64 tokens, as there, and walks through the tokens on
// the other side of the scores 64 at a time, which TMA loads up to two steps ahead. wgmma reads
// these from shared memory once for the block, where mma.sync has every warp read them. Softmax
// runs while the tensor cores work for the other blocks that share the multiprocessor: sequences of
// training are short, and many small blocks divide them more evenly than a few large ones. In the
// backward pass the products for gradients of probabilities run while the probabilities are
// computed, and those for dv while these gradients become those of scores. A tile of TMA has 64
// tokens and 64 columns, which may lie beyond the sequence or the head. Such columns are left out
// of every wgmma. Such tokens are of other sequences, or zeros beyond them all; their weights are
// zero.
#include "attention_train.cuh"
#include "wgmma.cuh"

#if HOPPER

constexpr int STAGES = ATTENTION_TRAIN_HOPPER_STAGES;
constexpr int COLUMNS = ATTENTION_HOPPER_COLUMNS;
constexpr int TILE_BYTES = TILE * COLUMNS * 2;
static_assert(THREADS == WARPGROUP, "a block is a warpgroup");

// Bytes of 64 tokens of a head in shared memory.
template <int SIZE>
DEVICE constexpr int rows_bytes() {
    return (SIZE + COLUMNS - 1) / COLUMNS * TILE_BYTES;
}

// Has TMA load 64 tokens of a head, whose first column is `column`. By one thread.
template <int SIZE>
DEVICE void load_rows(char* shared, const TensorMap* map, uint32_t token, uint32_t column,
                      uint64_t* full) {
    UNROLL
    for (int i = 0; i < rows_bytes<SIZE>() / TILE_BYTES; i++) {
        tma_load(shared + i * TILE_BYTES, map, token, column + i * COLUMNS, full);
    }
}
// The same for queries (part 0), keys (1) or values (2).
template <int SIZE>
DEVICE void load_part(char* shared, const TensorMap* qkv, const Work& w, int part, uint32_t token,
                      uint64_t* full) {
    load_rows<SIZE>(shared, qkv, token, (w.head * 3 + part) * SIZE, full);
}
// Loads keys and values of step `s` to its stage.
template <int SIZE>
DEVICE void load_keys_values(char* shared, const TensorMap* qkv, const Work& w, uint32_t s,
                             uint64_t* full) {
    constexpr int ROWS = rows_bytes<SIZE>();
    char* stage = shared + s % STAGES * 2 * ROWS;
    uint32_t token = w.tile.sequence_start + s * TILE;
    mbarrier_arrive_expect_tx(&full[s % STAGES], 2 * ROWS);
    load_part<SIZE>(stage, qkv, w, 1, token, &full[s % STAGES]);
    load_part<SIZE>(stage + ROWS, qkv, w, 2, token, &full[s % STAGES]);
}

// Makes the mbarriers that say when a stage is full. All threads call it.
DEVICE void init_stages(uint64_t* full) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbarrier_init(&full[i], 1);
        fence_mbarrier_init();
    }
    block_sync();
}

// Issues the wgmma for c = a b^T, with a = [64, SIZE] in registers and b = [64, SIZE].
template <class T, int SIZE>
DEVICE void start_abt(float (&c)[TILE / 2], const uint32_t (&a)[SIZE / 16][4], const char* b) {
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) {
        wgmma_rs<T, TILE, false>(c, a[i], wgmma_descriptor(b + i / 4 * TILE_BYTES, i % 4 * 16),
                                 i == 0);
    }
}
// The same for c += a b^T with both in shared memory.
template <class T, int SIZE>
DEVICE void start_abt(float (&c)[TILE / 2], const char* a, const char* b) {
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) {
        wgmma_ss<T, TILE>(c, wgmma_descriptor(a + i / 4 * TILE_BYTES, i % 4 * 16),
                          wgmma_descriptor(b + i / 4 * TILE_BYTES, i % 4 * 16));
    }
}
// Issues the wgmma for c += a b, with a = [64, 64] in registers and b = [64, SIZE].
template <class T, int SIZE>
DEVICE void start_ab(float (&c)[SIZE / 2], const uint32_t (&a)[TILE / 16][4], const char* b) {
    UNROLL
    for (int i = 0; i < TILE / 16; i++) {
        wgmma_rs<T, SIZE, true>(c, a[i], wgmma_descriptor_transposed(b, i * 16, TILE_BYTES), false);
    }
}
template <class T>
DEVICE void pack_operands(uint32_t (&out)[TILE / 16][4], const float (&sums)[TILE / 2]) {
    UNROLL
    for (int i = 0; i < TILE / 16; i++) pack_operand<T>(out[i], sums + 8 * i);
}

template <class T, int SIZE>
DEVICE void attention_train_hopper_forward(const TensorMap* qkv, const AttentionTrainArgs& a) {
    constexpr int ROWS = rows_bytes<SIZE>();
    char* shared = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + STAGES * 2 * ROWS);
    init_stages(full);
    griddep_wait();
    const Work w = work_of_block(a);
    uint32_t keys = w.tile.first + w.tile.count - w.tile.sequence_start;
    uint32_t steps = (keys + TILE - 1) / TILE;
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < STAGES && s < steps; s++) {
            load_keys_values<SIZE>(shared, qkv, w, s, full);
        }
    }
    uint32_t q[SIZE / 16][4];
    load_train_queries<T, SIZE>(q, a, w);
    uint32_t position = w.tile.first - w.tile.sequence_start + lane_row(0);
    uint32_t positions[2] = {position, position + 8};
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    float y[SIZE / 2] = {}, scores[TILE / 2] = {}, rescale[2];
    SoftmaxState softmax;
    for (uint32_t s = 0; s < steps; s++) {
        const char* k = shared + s % STAGES * 2 * ROWS;
        mbarrier_wait_parity(&full[s % STAGES], s / STAGES & 1);
        wgmma_fence();
        start_abt<T, SIZE>(scores, q, k);
        wgmma_commit_group();
        wgmma_wait_group<0>();
        wgmma_fence_operand(scores);
        // only the last step has keys behind a query
        online_softmax(scores, softmax, rescale, positions, s * TILE, s + 1 == steps, scale, slope);
        if (warp_any(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
            UNROLL
            for (int i = 0; i < SIZE / 2; i++) y[i] *= rescale[i / 2 % 2];
        }
        uint32_t p[TILE / 16][4];
        pack_operands<T>(p, scores);
        wgmma_fence();
        start_ab<T, SIZE>(y, p, k + ROWS);
        wgmma_commit_group();
        wgmma_wait_group<0>();
        wgmma_fence_operand(y);
        if (s + STAGES < steps) {
            block_sync(); // all warps have read the stage
            if (threadIdx.x == 0) load_keys_values<SIZE>(shared, qkv, w, s + STAGES, full);
        }
    }
    griddep_launch_dependents();
    store_attended<T, SIZE>(a, w, y, softmax);
}

// Gradients of queries, and the dot products that the kernel for keys needs.
template <class T, int SIZE>
DEVICE void attention_train_hopper_dq(const TensorMap* qkv, const AttentionTrainArgs& a) {
    constexpr int ROWS = rows_bytes<SIZE>();
    char* shared = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + STAGES * 2 * ROWS);
    init_stages(full);
    griddep_wait();
    const Work w = work_of_block(a);
    uint32_t keys = w.tile.first + w.tile.count - w.tile.sequence_start;
    uint32_t steps = (keys + TILE - 1) / TILE;
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < STAGES && s < steps; s++) {
            load_keys_values<SIZE>(shared, qkv, w, s, full);
        }
    }
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    uint32_t q[SIZE / 16][4], dy[SIZE / 16][4];
    load_train_queries<T, SIZE>(q, a, w);
    QueryStats stats = load_gradients<T, SIZE>(dy, a, w, slope);
    float dq[SIZE / 2] = {}, scores[TILE / 2] = {}, gradients[TILE / 2] = {};
    for (uint32_t s = 0; s < steps; s++) {
        const char* k = shared + s % STAGES * 2 * ROWS;
        mbarrier_wait_parity(&full[s % STAGES], s / STAGES & 1);
        wgmma_fence();
        start_abt<T, SIZE>(scores, q, k);
        wgmma_commit_group();
        start_abt<T, SIZE>(gradients, dy, k + ROWS);
        wgmma_commit_group();
        wgmma_wait_group<1>();
        wgmma_fence_operand(scores);
        int first = static_cast<int>(w.tile.sequence_start + s * TILE - w.tile.first);
        probabilities_by_query<TILE>(scores, stats, first, first == 0, scale, slope);
        wgmma_wait_group<0>();
        wgmma_fence_operand(gradients);
        gradients_by_query<TILE>(gradients, scores, stats);
        uint32_t ds[TILE / 16][4];
        pack_operands<T>(ds, gradients);
        wgmma_fence();
        start_ab<T, SIZE>(dq, ds, k);
        wgmma_commit_group();
        wgmma_wait_group<0>();
        wgmma_fence_operand(dq);
        if (s + STAGES < steps) {
            block_sync(); // as in the forward pass
            if (threadIdx.x == 0) load_keys_values<SIZE>(shared, qkv, w, s + STAGES, full);
        }
    }
    griddep_launch_dependents();
    store_gradients<T, SIZE>(a, w, 0, dq);
}

// Gradients of keys and values.
template <class T, int SIZE>
DEVICE void attention_train_hopper_dkv(const TensorMap* qkv, const TensorMap* dys,
                                       const AttentionTrainArgs& a) {
    constexpr int ROWS = rows_bytes<SIZE>();
    char* k = shared_memory();
    char* v = k + ROWS;
    char* stages = v + ROWS; // queries and gradients of their results
    uint64_t* full = reinterpret_cast<uint64_t*>(stages + STAGES * 2 * ROWS);
    float* all_stats = reinterpret_cast<float*>(full + STAGES); // [stage, 2, query]
    griddep_wait();
    const Work w = work_of_block(a);
    uint32_t first = w.tile.first, steps = (w.tile.sequence_end - first + TILE - 1) / TILE;
    const float scale = score_scale<SIZE>(), slope = a.slopes[w.head] * LOG2_E;
    UNROLL
    for (int s = 0; s < STAGES; s++) {
        all_stats[s * 2 * TILE + threadIdx.x] =
            load_query_stat<TILE>(a, w, first + s * TILE, slope);
    }
    init_stages(full);
    auto load_step = [&](uint32_t s) {
        char* stage = stages + s % STAGES * 2 * ROWS;
        uint32_t token = first + s * TILE;
        load_part<SIZE>(stage, qkv, w, 0, token, &full[s % STAGES]);
        load_rows<SIZE>(stage + ROWS, dys, token, w.head * SIZE, &full[s % STAGES]);
    };
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(&full[0], 4 * ROWS); // the first step needs keys and values too
        load_part<SIZE>(k, qkv, w, 1, first, &full[0]);
        load_part<SIZE>(v, qkv, w, 2, first, &full[0]);
        load_step(0);
        for (uint32_t s = 1; s < STAGES && s < steps; s++) {
            mbarrier_arrive_expect_tx(&full[s], 2 * ROWS);
            load_step(s);
        }
    }
    float biases[2] = {slope * static_cast<float>(lane_row(0)),
                       slope * static_cast<float>(lane_row(1))};
    float dk[SIZE / 2] = {}, dv[SIZE / 2] = {};
    for (uint32_t s = 0; s < steps; s++) {
        const char* q = stages + s % STAGES * 2 * ROWS;
        const char* dy = q + ROWS;
        float* stats = all_stats + s % STAGES * 2 * TILE;
        float scores[TILE / 2] = {}, gradients[TILE / 2] = {};
        mbarrier_wait_parity(&full[s % STAGES], s / STAGES & 1);
        wgmma_fence();
        start_abt<T, SIZE>(scores, k, q);
        wgmma_commit_group();
        start_abt<T, SIZE>(gradients, v, dy);
        wgmma_commit_group();
        float next_stat = load_query_stat<TILE>(a, w, first + (s + STAGES) * TILE, slope);
        wgmma_wait_group<1>();
        wgmma_fence_operand(scores);
        // in the first step queries are among the keys, later behind them
        probabilities_by_key<TILE>(scores, stats, biases, 0, s == 0, scale);
        uint32_t p[TILE / 16][4], ds[TILE / 16][4];
        pack_operands<T>(p, scores);
        wgmma_fence();
        start_ab<T, SIZE>(dv, p, dy);
        wgmma_commit_group();
        wgmma_wait_group<1>();
        wgmma_fence_operand(gradients);
        gradients_by_key<TILE>(gradients, scores, stats);
        pack_operands<T>(ds, gradients);
        wgmma_fence();
        start_ab<T, SIZE>(dk, ds, q);
        wgmma_commit_group();
        wgmma_wait_group<0>();
        wgmma_fence_operand(dv);
        wgmma_fence_operand(dk);
        // all warps have read the stage, and see what was stored for the next one
        if (s + 1 < steps) block_sync();
        if (s + STAGES < steps) {
            stats[threadIdx.x] = next_stat;
            if (threadIdx.x == 0) {
                mbarrier_arrive_expect_tx(&full[s % STAGES], 2 * ROWS);
                load_step(s + STAGES);
            }
        }
    }
    griddep_launch_dependents();
    store_gradients<T, SIZE>(a, w, 1, dk);
    store_gradients<T, SIZE>(a, w, 2, dv);
}

#define ATTENTION_TRAIN_HOPPER(pass, T, SIZE, blocks)                            \
    KERNEL_SHARED(attention_train_hopper_##pass##_##T##_##SIZE, THREADS, blocks) \
    (const GRID_CONSTANT TensorMap qkv, AttentionTrainArgs a) {                  \
        attention_train_hopper_##pass<T, SIZE>(&qkv, a);                         \
    }                                                                            \
    EXPORT(attention_train_hopper_##pass##_##T##_##SIZE)
#define ATTENTION_TRAIN_HOPPER_DKV(T, SIZE, blocks)                                               \
    KERNEL_SHARED(attention_train_hopper_dkv_##T##_##SIZE, THREADS, blocks)                       \
    (const GRID_CONSTANT TensorMap qkv, const GRID_CONSTANT TensorMap dy, AttentionTrainArgs a) { \
        attention_train_hopper_dkv<T, SIZE>(&qkv, &dy, a);                                        \
    }                                                                                             \
    EXPORT(attention_train_hopper_dkv_##T##_##SIZE)
// as many blocks as share a multiprocessor without spilled registers
#define ATTENTION_TRAIN_HOPPER_ALL(T)          \
    ATTENTION_TRAIN_HOPPER(forward, T, 32, 4)  \
    ATTENTION_TRAIN_HOPPER(forward, T, 64, 4)  \
    ATTENTION_TRAIN_HOPPER(forward, T, 80, 3)  \
    ATTENTION_TRAIN_HOPPER(forward, T, 96, 3)  \
    ATTENTION_TRAIN_HOPPER(forward, T, 128, 3) \
    ATTENTION_TRAIN_HOPPER(dq, T, 32, 4)       \
    ATTENTION_TRAIN_HOPPER(dq, T, 64, 3)       \
    ATTENTION_TRAIN_HOPPER(dq, T, 80, 2)       \
    ATTENTION_TRAIN_HOPPER(dq, T, 96, 2)       \
    ATTENTION_TRAIN_HOPPER(dq, T, 128, 2)      \
    ATTENTION_TRAIN_HOPPER_DKV(T, 32, 3)       \
    ATTENTION_TRAIN_HOPPER_DKV(T, 64, 3)       \
    ATTENTION_TRAIN_HOPPER_DKV(T, 80, 2)       \
    ATTENTION_TRAIN_HOPPER_DKV(T, 96, 2)       \
    ATTENTION_TRAIN_HOPPER_DKV(T, 128, 2)
ATTENTION_TRAIN_HOPPER_ALL(bf16)

#endif // HOPPER
