// Attention over the paged KV cache with ALiBi, many queries of a sequence at a time, on Hopper
// (after FlashAttention-3, Shah et al. 2024).
//
//   q [tokens, head, size] and out [tokens, head, size] in 16 bits
//   keys and values [block, head, 16, size] in 16 bits
//
// FLOPs: 4 * size for each query and each position that it attends to. Least bytes: queries and
// results once, keys and values once for each 128 queries.
// A block takes one head of 128 queries. One warp of the first warpgroup is the producer: it has
// TMA load keys and values of 64 positions at a time, up to four steps ahead, in one tile for each
// cache block of 16 positions and each 64 columns. The other two warpgroups have 64 queries each,
// with their operands in registers. They issue the scores of a step before the weighted sums of the
// previous step, so that the tensor cores work on both while the other warpgroup computes its
// softmax. Columns beyond the head size are zeros in shared memory and are left out of every wgmma.
// Steps begin at multiples of 64 positions, so that the result of a query does not depend on which
// queries share its block.
#include "attention_tiles.cuh"
#include "memory.cuh"
#include "wgmma.cuh"

#if HOPPER

constexpr int CONSUMERS = 2;
constexpr int CONSUMER_QUERIES = 64;
constexpr int STEP = ATTENTION_STEP;
constexpr int STAGES = ATTENTION_HOPPER_STAGES;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
static_assert(THREADS == ATTENTION_HOPPER_THREADS, "as the host launches it");
static_assert(CONSUMERS * CONSUMER_QUERIES == ATTENTION_HOPPER_QUERIES, "as the host divides them");
constexpr int COLUMNS = ATTENTION_HOPPER_COLUMNS;
constexpr int TILE_BYTES = STEP * COLUMNS * 2; // a cache block fills a quarter of a tile

template <int SIZE>
DEVICE constexpr int tiles_of_head() {
    return (SIZE + COLUMNS - 1) / COLUMNS;
}
template <int SIZE>
DEVICE constexpr int stage_bytes() {
    return 2 * tiles_of_head<SIZE>() * TILE_BYTES;
}

// Loads keys and values of all steps, by one warp. `keys` and `values` are the rows of the tensor
// map where those of this layer begin.
template <int SIZE>
DEVICE void load_steps(char* shared, uint64_t* full, uint64_t* empty, const TensorMap* cache,
                       uint32_t keys, uint32_t values, const AttentionArgs& a,
                       const uint32_t* table, uint32_t head, uint32_t end, uint32_t steps) {
    constexpr int TILES = tiles_of_head<SIZE>();
    constexpr int BLOCKS = STEP / CACHE_BLOCK;
    constexpr int COPIES = 2 * TILES * BLOCKS;
    static_assert(COPIES <= WARP, "a copy for each lane");
    int lane = lane_index();
    int part = lane / (TILES * BLOCKS), tile = lane / BLOCKS % TILES, block = lane % BLOCKS;
    for (uint32_t s = 0; s < steps; s++) {
        uint32_t stage = s % STAGES;
        mbarrier_wait_parity(&empty[stage], (s / STAGES + 1) & 1);
        if (lane == 0) mbarrier_arrive_expect_tx(&full[stage], stage_bytes<SIZE>());
        warp_sync();
        if (lane < COPIES) {
            // Blocks beyond the sequence load its last block again. Their scores are masked, but
            // their values must be numbers, since zero times NaN would be NaN.
            uint32_t last = (end - 1) / CACHE_BLOCK, number = s * BLOCKS + block;
            uint32_t row = (part == 0 ? keys : values) +
                           (table[number < last ? number : last] * a.heads + head) * CACHE_BLOCK;
            char* to = shared + stage * stage_bytes<SIZE>() + (part * TILES + tile) * TILE_BYTES +
                       block * CACHE_BLOCK * COLUMNS * 2;
            tma_load(to, cache, row, tile * COLUMNS, &full[stage]);
        }
    }
}

// Issues the wgmma for scores = q k^T of a step.
template <class T, int SIZE>
DEVICE void start_scores(float (&scores)[STEP / 2], const uint32_t (&q)[SIZE / 16][4],
                         const char* keys) {
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) {
        wgmma_rs<T, STEP, false>(scores, q[i],
                                 wgmma_descriptor(keys + i / 4 * TILE_BYTES, i % 4 * 16), i == 0);
    }
}

// Issues the wgmma for out += p v of a step.
template <class T, int SIZE>
DEVICE void start_output(float (&out)[SIZE / 2], const uint32_t (&p)[STEP / 16][4],
                         const char* values) {
    UNROLL
    for (int k = 0; k < STEP / 16; k++) {
        wgmma_rs<T, SIZE, true>(out, p[k], wgmma_descriptor_transposed(values, k * 16, TILE_BYTES),
                                false);
    }
}

// Packs softmax weights as operands of wgmma. Not while the wgmma of the previous step still read
// theirs.
template <class T>
DEVICE void pack_weights(uint32_t (&p)[STEP / 16][4], const float (&weights)[STEP / 2]) {
    UNROLL
    for (int k = 0; k < STEP / 16; k++) {
        UNROLL
        for (int i = 0; i < 4; i++)
            p[k][i] = pack<T>(weights[8 * k + 2 * i], weights[8 * k + 2 * i + 1]);
    }
}

template <class T, int SIZE>
DEVICE void attention_hopper(const TensorMap* cache, uint32_t keys_row, uint32_t values_row,
                             const AttentionArgs& a) {
    char* shared = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + STAGES * stage_bytes<SIZE>());
    uint64_t* empty = full + STAGES;
    if (threadIdx.x == 0) prefetch_tensormap(cache);
    init_pipeline_stages(full, empty, STAGES, CONSUMERS * WARPGROUP / WARP);
    griddep_wait();
    uint32_t head = blockIdx.x;
    uint32_t first_token = a.tiles[2 * tile_number()], count = a.tiles[2 * tile_number() + 1];
    uint32_t first_position = a.positions[first_token];
    uint32_t steps = (first_position + count + STEP - 1) / STEP;
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_dec<40>();
        const uint32_t* table =
            a.tables + static_cast<size_t>(a.spans[first_token]) * a.table_width;
        if (warp_index() == 0) {
            load_steps<SIZE>(shared, full, empty, cache, keys_row, values_row, a, table, head,
                             first_position + count, steps);
        }
        return;
    }
    setmaxnreg_inc<232>();
    int lane = lane_index(), g = lane / 4;
    uint32_t first_query = (warpgroup_index() - 1) * CONSUMER_QUERIES;
    // rows beyond the last query compute the last one again
    uint32_t q0 = first_query + warp_index() % 4 * 16 + g, q1 = q0 + 8;
    uint32_t rows[2] = {q0 < count ? q0 : count - 1, q1 < count ? q1 : count - 1};
    uint32_t positions[2] = {first_position + rows[0], first_position + rows[1]};
    uint32_t last_query =
        first_query + CONSUMER_QUERIES < count ? first_query + CONSUMER_QUERIES : count;
    // the steps that this warpgroup has to compute: none if it has no queries
    uint32_t own_steps = first_query < count ? (first_position + last_query + STEP - 1) / STEP : 0;
    uint32_t q[SIZE / 16][4];
    load_queries<T, SIZE>(q, a, first_token, rows, head);
    const float scale = LOG2_E / sqrtf(static_cast<float>(SIZE)), slope = a.slopes[head] * LOG2_E;
    float out[SIZE / 2], scores[STEP / 2], rescale[2];
    uint32_t p[STEP / 16][4];
    UNROLL
    for (int i = 0; i < SIZE / 2; i++) out[i] = 0;
    UNROLL
    for (int i = 0; i < STEP / 2; i++) scores[i] = 0;
    SoftmaxState softmax;
    auto stage_of = [&](uint32_t s) { return shared + s % STAGES * stage_bytes<SIZE>(); };
    auto values_of = [&](uint32_t s) { return stage_of(s) + tiles_of_head<SIZE>() * TILE_BYTES; };
    auto consumer_wait = [&](uint32_t s) {
        mbarrier_wait_parity(&full[s % STAGES], s / STAGES & 1);
    };
    auto consumer_release = [&](uint32_t s) {
        if (lane == 0) mbarrier_arrive(&empty[s % STAGES]);
    };
    // from this step on, some query does not attend to all positions
    uint32_t masked = (first_position + first_query + 1) / STEP;
    if (own_steps > 0) {
        consumer_wait(0);
        wgmma_fence();
        start_scores<T, SIZE>(scores, q, stage_of(0));
        wgmma_commit_group();
        wgmma_wait_group<0>();
        wgmma_fence_operand(scores);
        online_softmax(scores, softmax, rescale, positions, 0, masked == 0, scale, slope);
        pack_weights<T>(p, scores);
        if (own_steps > 1) consumer_wait(1);
        for (uint32_t s = 1; s < own_steps; s++) {
            wgmma_fence();
            start_scores<T, SIZE>(scores, q, stage_of(s));
            wgmma_commit_group();
            start_output<T, SIZE>(out, p, values_of(s - 1));
            wgmma_commit_group();
            wgmma_wait_group<1>();
            wgmma_fence_operand(scores);
            online_softmax(scores, softmax, rescale, positions, s * STEP, masked <= s, scale,
                           slope);
            // The next step is waited for here and not where it begins, because this loop keeps
            // ptxas from moving the wait for the weighted sums up in front of the softmax: it moves
            // no instruction across a branch. The stage of the next step was released two steps
            // ago, so this wait depends on nothing that this step has yet to do.
            if (s + 1 < own_steps) consumer_wait(s + 1);
            wgmma_wait_group<0>();
            wgmma_fence_operand(out);
            consumer_release(s - 1);
            if (warp_any(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
                UNROLL
                for (int i = 0; i < SIZE / 2; i++) out[i] *= rescale[i / 2 % 2];
            }
            pack_weights<T>(p, scores);
        }
        wgmma_fence();
        start_output<T, SIZE>(out, p, values_of(own_steps - 1));
        wgmma_commit_group();
        wgmma_wait_group<0>();
        wgmma_fence_operand(out);
        consumer_release(own_steps - 1);
    }
    for (uint32_t s = own_steps; s < steps; s++) {
        consumer_wait(s);
        consumer_release(s);
    }
    griddep_launch_dependents();
    uint32_t queries[2] = {q0, q1};
    store_results<T, SIZE>(a, first_token, queries, count, head, out, softmax.sum);
}

#define ATTENTION_HOPPER(T, SIZE)                                                 \
    KERNEL_ALONE(attention_hopper_##T##_##SIZE, THREADS)                          \
    (const GRID_CONSTANT TensorMap cache, uint32_t keys_row, uint32_t values_row, \
     AttentionArgs a) {                                                           \
        attention_hopper<T, SIZE>(&cache, keys_row, values_row, a);               \
    }                                                                             \
    EXPORT(attention_hopper_##T##_##SIZE)
#define ATTENTION_HOPPER_ALL(T) \
    ATTENTION_HOPPER(T, 32)     \
    ATTENTION_HOPPER(T, 64)     \
    ATTENTION_HOPPER(T, 80)     \
    ATTENTION_HOPPER(T, 96)     \
    ATTENTION_HOPPER(T, 128)
ATTENTION_HOPPER_ALL(bf16)
ATTENTION_HOPPER_ALL(f16)

#endif // HOPPER
