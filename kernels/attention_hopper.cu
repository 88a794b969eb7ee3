// Attention over the paged KV cache with ALiBi, many queries of a sequence at a time, on Hopper
// (after FlashAttention-3, Shah et al. 2024).
//
//   q [tokens, head, size] and out [tokens, head, size] in 16 bits
//   keys and values [block, head, 16, size] in 16 bits
//
// FLOPs: 4 * size for each query and position it sees; least bytes: queries and results once, keys
// and values once for each 128 queries. A block takes one head of 128 queries. One warp of the
// first warpgroup has the copy engine bring keys and values of 64 positions at a time, up to four
// steps ahead: a tile for each cache block of 16 positions and each 64 columns. The other two
// warpgroups have 64 queries each, their operands in registers: scores of a step are begun before
// the weighted sums of the one before, and both run on the tensor cores while the softmax of the
// other warpgroup runs beside them. Columns of a head beyond its size are zeros in shared memory
// and never multiplied. Steps begin at multiples of 64 positions: a query's result does not depend
// on which queries share its block.
#include "attention_tiles.cuh"
#include "memory.cuh"
#include "warpgroup.cuh"

#if HOPPER

constexpr int GROUPS = 2;
constexpr int GROUP_QUERIES = 64;
constexpr int STEP = 64; // positions
constexpr int STAGES = 4;
constexpr int THREADS = WARPGROUP * (1 + GROUPS);
constexpr int COLUMNS = 64;                    // of a tile
constexpr int TILE_BYTES = STEP * COLUMNS * 2; // one of the cache's blocks brings a quarter

template <int SIZE>
DEVICE constexpr int tiles_of_head() {
    return (SIZE + COLUMNS - 1) / COLUMNS;
}
template <int SIZE>
DEVICE constexpr int stage_bytes() {
    return 2 * tiles_of_head<SIZE>() * TILE_BYTES;
}

DEVICE float exp2_of(float x) {
#ifdef KERNEL_EMULATOR
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Brings keys and values of all steps, by one warp. `keys`, `values`: row of the map where the
// layer's begin.
template <int SIZE>
DEVICE void bring_steps(char* shared, uint64_t* full, uint64_t* empty, const TensorMap* cache,
                        uint32_t keys, uint32_t values, const Attention& a, const uint32_t* table,
                        uint32_t head, uint32_t end, int steps) {
    constexpr int TILES = tiles_of_head<SIZE>();
    constexpr int BLOCKS = STEP / BLOCK;
    constexpr int COPIES = 2 * TILES * BLOCKS;
    static_assert(COPIES <= WARP, "a copy for each lane");
    int lane = lane_index();
    int part = lane / (TILES * BLOCKS), tile = lane / BLOCKS % TILES, block = lane % BLOCKS;
    for (int s = 0; s < steps; s++) {
        int stage = s % STAGES;
        barrier_wait(&empty[stage], (s / STAGES + 1) & 1);
        if (lane == 0) barrier_arrive_expecting(&full[stage], stage_bytes<SIZE>());
        sync_warp();
        if (lane < COPIES) {
            // blocks beyond the sequence repeat its last one: their scores are masked, but their
            // values must be numbers
            uint32_t last = (end - 1) / BLOCK, number = s * BLOCKS + block;
            uint32_t row = (part == 0 ? keys : values) +
                           (table[number < last ? number : last] * a.heads + head) * BLOCK;
            char* to = shared + stage * stage_bytes<SIZE>() + (part * TILES + tile) * TILE_BYTES +
                       block * BLOCK * COLUMNS * 2;
            copy_tile(to, cache, row, tile * COLUMNS, &full[stage]);
        }
    }
}

// Begins scores = q k^T of a step.
template <class T, int SIZE>
DEVICE void begin_scores(float (&scores)[STEP / 2], const uint32_t (&q)[SIZE / 16][4],
                         const char* keys) {
    UNROLL
    for (int i = 0; i < SIZE / 16; i++) {
        multiply_rows<T, STEP, false>(scores, q[i], operand(keys + i / 4 * TILE_BYTES, i % 4 * 16),
                                      i == 0);
    }
}

// Begins out += p v of a step.
template <class T, int SIZE>
DEVICE void begin_sums(float (&out)[SIZE / 2], const uint32_t (&p)[STEP / 16][4],
                       const char* values) {
    constexpr int WHOLE = SIZE / COLUMNS, REST = SIZE % COLUMNS;
    UNROLL
    for (int k = 0; k < STEP / 16; k++) {
        UNROLL
        for (int j = 0; j < WHOLE; j++) {
            multiply_rows<T, COLUMNS, true>(out + j * COLUMNS / 2, p[k],
                                            operand_transposed(values + j * TILE_BYTES, k * 16),
                                            false);
        }
        if constexpr (REST > 0) {
            multiply_rows<T, REST, true>(out + WHOLE * COLUMNS / 2, p[k],
                                         operand_transposed(values + WHOLE * TILE_BYTES, k * 16),
                                         false);
        }
    }
}

// What a thread keeps of its two queries, 8 rows apart.
struct Softmax {
    float most[2], weight[2];
};

// Scores of positions from `first` on become weights, 1 for the largest score so far; `shrink` is
// what earlier sums are worth now. Everything is in powers of two.
DEVICE void soften(float (&scores)[STEP / 2], Softmax& soft, float (&shrink)[2],
                   const uint32_t (&positions)[2], uint32_t first, bool masked, float scale,
                   float slope) {
    int t = lane_index() % 4;
    UNROLL
    for (int half = 0; half < 2; half++) {
        float best = soft.most[half];
        // distances of a few hundred positions at most are exact
        float distance =
            static_cast<float>(static_cast<int>(first + 2 * t) - static_cast<int>(positions[half]));
        UNROLL
        for (int n = 0; n < STEP / 8; n++) {
            UNROLL
            for (int j = 0; j < 2; j++) {
                float& x = scores[4 * n + 2 * half + j];
                x = x * scale + slope * (distance + static_cast<float>(n * 8 + j));
                if (masked && first + n * 8 + 2 * t + j > positions[half]) x = -INFINITY;
                best = fmaxf(best, x);
            }
        }
        // a row's positions lie in four neighbouring lanes; every query sees position 0, so that
        // `best` is a number
        best = fmaxf(best, shuffle_xor(best, 1));
        best = fmaxf(best, shuffle_xor(best, 2));
        shrink[half] = exp2_of(soft.most[half] - best);
        soft.most[half] = best;
        float sum = 0;
        UNROLL
        for (int n = 0; n < STEP / 8; n++) {
            UNROLL
            for (int j = 0; j < 2; j++) {
                float& x = scores[4 * n + 2 * half + j];
                x = exp2_of(x - best);
                sum += x;
            }
        }
        soft.weight[half] = soft.weight[half] * shrink[half] + sum;
    }
}

// Weights as operands of a product. Not while that of the step before still reads its own.
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
DEVICE void attend_hopper(const TensorMap* cache, uint32_t keys_row, uint32_t values_row,
                          const Attention& a) {
    char* shared = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(shared + STAGES * stage_bytes<SIZE>());
    uint64_t* empty = full + STAGES;
    init_stages(full, empty, STAGES, GROUPS * WARPGROUP / WARP);
    wait_for_earlier_kernels();
    uint32_t head = blockIdx.x;
    uint32_t first_token = a.tiles[2 * blockIdx.y], count = a.tiles[2 * blockIdx.y + 1];
    uint32_t first_position = a.positions[first_token];
    int steps = (first_position + count + STEP - 1) / STEP;
    if (threadIdx.x < WARPGROUP) {
        give_registers<40>();
        const uint32_t* table =
            a.tables + static_cast<size_t>(a.spans[first_token]) * a.table_width;
        if (warp_index() == 0) {
            bring_steps<SIZE>(shared, full, empty, cache, keys_row, values_row, a, table, head,
                              first_position + count, steps);
        }
        return;
    }
    take_registers<232>();
    int lane = lane_index(), g = lane / 4;
    uint32_t first_query = (warpgroup_index() - 1) * GROUP_QUERIES;
    // rows beyond the last query repeat it
    uint32_t q0 = first_query + warp_index() % 4 * 16 + g, q1 = q0 + 8;
    uint32_t rows[2] = {q0 < count ? q0 : count - 1, q1 < count ? q1 : count - 1};
    uint32_t positions[2] = {first_position + rows[0], first_position + rows[1]};
    uint32_t last_query = first_query + GROUP_QUERIES < count ? first_query + GROUP_QUERIES : count;
    // the last steps are beyond this group's queries, all of them if it has none
    int own = first_query < count ? (first_position + last_query + STEP - 1) / STEP : 0;
    uint32_t q[SIZE / 16][4];
    load_queries<T, SIZE>(q, a, first_token, rows, head);
    const float log2_e = 1.44269504f;
    const float scale = log2_e / sqrtf(static_cast<float>(SIZE)), slope = a.slopes[head] * log2_e;
    float out[SIZE / 2], scores[STEP / 2], shrink[2];
    uint32_t p[STEP / 16][4];
    UNROLL
    for (int i = 0; i < SIZE / 2; i++) out[i] = 0;
    UNROLL
    for (int i = 0; i < STEP / 2; i++) scores[i] = 0;
    Softmax soft = {{-INFINITY, -INFINITY}, {0, 0}};
    auto stage_of = [&](int s) { return shared + s % STAGES * stage_bytes<SIZE>(); };
    auto values_of = [&](int s) { return stage_of(s) + tiles_of_head<SIZE>() * TILE_BYTES; };
    auto release = [&](int s) {
        if (lane == 0) barrier_arrive(&empty[s % STAGES]);
    };
    // from this step on some query does not see all positions
    int masked = (first_position + first_query + 1) / STEP;
    if (own > 0) {
        barrier_wait(&full[0], 0);
        products_begin();
        begin_scores<T, SIZE>(scores, q, stage_of(0));
        products_commit();
        products_wait<0>();
        products_arrived(scores);
        soften(scores, soft, shrink, positions, 0, masked <= 0, scale, slope);
        pack_weights<T>(p, scores);
        for (int s = 1; s < own; s++) {
            barrier_wait(&full[s % STAGES], s / STAGES & 1);
            products_begin();
            begin_scores<T, SIZE>(scores, q, stage_of(s));
            products_commit();
            begin_sums<T, SIZE>(out, p, values_of(s - 1));
            products_commit();
            products_wait<1>();
            products_arrived(scores);
            soften(scores, soft, shrink, positions, s * STEP, masked <= s, scale, slope);
            products_wait<0>();
            products_arrived(out);
            release(s - 1);
            if (any_lane(shrink[0] != 1.0f || shrink[1] != 1.0f)) {
                UNROLL
                for (int i = 0; i < SIZE / 2; i++) out[i] *= shrink[i / 2 % 2];
            }
            pack_weights<T>(p, scores);
        }
        products_begin();
        begin_sums<T, SIZE>(out, p, values_of(own - 1));
        products_commit();
        products_wait<0>();
        products_arrived(out);
        release(own - 1);
    }
    for (int s = own; s < steps; s++) {
        barrier_wait(&full[s % STAGES], s / STAGES & 1);
        release(s);
    }
    let_next_kernel_begin();
    uint32_t queries[2] = {q0, q1};
    store_results<T, SIZE>(a, first_token, queries, count, head, out, soft.weight);
}

#define ATTEND_HOPPER(T, SIZE)                                                                   \
    KERNEL_ALONE(attend_hopper_##T##_##SIZE, THREADS)                                            \
    (const GRID_CONSTANT TensorMap cache, uint32_t keys_row, uint32_t values_row, Attention a) { \
        attend_hopper<T, SIZE>(&cache, keys_row, values_row, a);                                 \
    }                                                                                            \
    EXPORT(attend_hopper_##T##_##SIZE)
#define ATTEND_HOPPER_ALL(T) \
    ATTEND_HOPPER(T, 32)     \
    ATTEND_HOPPER(T, 64)     \
    ATTEND_HOPPER(T, 80)     \
    ATTEND_HOPPER(T, 96)     \
    ATTEND_HOPPER(T, 128)
ATTEND_HOPPER_ALL(bf16)
ATTEND_HOPPER_ALL(f16)

#endif // HOPPER
