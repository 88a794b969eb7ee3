// Attention over the paged KV cache with ALiBi, many queries of a sequence at a time (after
// FlashAttention-2, Dao 2023), on every GPU since Ampere.
//
//   q [tokens, head, size] and out [tokens, head, size] in 16 bits
//   keys and values [block, head, 16, size] in 16 bits
//
// FLOPs: 4 * size for each query and each position that it attends to. Least bytes: queries and
// results once, keys and values once for each 64 queries.
// A block takes one head of 64 queries, in 4 warps of 16, and walks through the positions of the
// sequence 64 at a time: scores and weighted sums on the tensor cores, online softmax in registers,
// and cp.async of the next step during the computation of this one. Rows in shared memory are 16
// bytes longer than a head, so that ldmatrix has no bank conflicts. Steps begin at multiples of 64
// positions, so that the result of a query does not depend on which queries share its block.
#include "attention_tiles.cuh"
#include "memory.cuh"
#include "mma.cuh"

constexpr int WARPS = ATTENTION_PREFILL_WARPS; // each has 16 queries
constexpr int STEP = ATTENTION_STEP;
static_assert(16 * WARPS == ATTENTION_PREFILL_QUERIES, "all queries have a warp");

// Starts copies of the keys and values of the positions from `first` on, with zeros from `end` on.
template <class T, int SIZE>
DEVICE void load_step(char* keys, char* values, const AttentionArgs& a, const uint32_t* table,
                      uint32_t head, uint32_t first, uint32_t end) {
    constexpr int STRIDE = SIZE * 2 + 16;
    constexpr int CHUNKS = SIZE / 8;
    for (int i = threadIdx.x; i < STEP * CHUNKS; i += WARPS * WARP) {
        int r = i / CHUNKS, c = i % CHUNKS;
        uint32_t position = first + r;
        bool valid = position < end;
        size_t block = valid ? table[position / CACHE_BLOCK] : 0;
        size_t at =
            ((block * a.heads + head) * CACHE_BLOCK + position % CACHE_BLOCK) * SIZE + c * 8;
        cp_async(keys + r * STRIDE + c * 16, static_cast<const T*>(a.keys) + at, valid);
        cp_async(values + r * STRIDE + c * 16, static_cast<const T*>(a.values) + at, valid);
    }
}

template <class T, int SIZE>
DEVICE void attention_prefill(const AttentionArgs& a) {
    constexpr int STRIDE = SIZE * 2 + 16;
    constexpr int STAGE = 2 * STEP * STRIDE;
    uint32_t head = blockIdx.x;
    char* shared = shared_memory();
    griddep_wait();
    uint32_t first_token = a.tiles[2 * tile_number()], count = a.tiles[2 * tile_number() + 1];
    uint32_t first_position = a.positions[first_token];
    uint32_t end = first_position + count;
    const uint32_t* table = a.tables + static_cast<size_t>(a.spans[first_token]) * a.table_width;
    int steps = (end + STEP - 1) / STEP;
    load_step<T, SIZE>(shared, shared + STEP * STRIDE, a, table, head, 0, end);
    cp_async_commit_group();
    int lane = lane_index(), g = lane / 4;
    // A lane works on two of this warp's 16 queries. Rows beyond the last query compute the last
    // one again.
    uint32_t q0 = warp_index() * 16 + g, q1 = q0 + 8;
    uint32_t rows[2] = {q0 < count ? q0 : count - 1, q1 < count ? q1 : count - 1};
    uint32_t q[SIZE / 16][4];
    load_queries<T, SIZE>(q, a, first_token, rows, head);
    uint32_t positions[2] = {first_position + rows[0], first_position + rows[1]};
    // from this step on, some query of the warp does not attend to all positions
    int masked = (first_position + warp_index() * 16 + 1) / STEP;
    const float scale = LOG2_E / sqrtf(static_cast<float>(SIZE)), slope = a.slopes[head] * LOG2_E;
    float out[SIZE / 8][4] = {};
    SoftmaxState softmax;
    for (int s = 0; s < steps; s++) {
        char* keys = shared + s % 2 * STAGE;
        char* values = keys + STEP * STRIDE;
        if (s + 1 < steps) {
            char* next = shared + (s + 1) % 2 * STAGE;
            load_step<T, SIZE>(next, next + STEP * STRIDE, a, table, head, (s + 1) * STEP, end);
        }
        cp_async_commit_group();
        cp_async_wait_group<1>();
        block_sync();
        float scores[STEP / 8][4] = {};
        UNROLL
        for (int i = 0; i < SIZE / 16; i++) {
            UNROLL
            for (int n = 0; n < STEP / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * STRIDE +
                                   (i * 2 + lane / 8 % 2) * 16);
                uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma_m16n8k16<T>(scores[2 * n], q[i], b0);
                mma_m16n8k16<T>(scores[2 * n + 1], q[i], b1);
            }
        }
        float rescale[2];
        online_softmax(&scores[0][0], softmax, rescale, positions, s * STEP, masked <= s, scale,
                       slope);
        if (warp_any(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
            UNROLL
            for (int d = 0; d < SIZE / 8; d++) {
                UNROLL
                for (int i = 0; i < 4; i++) out[d][i] *= rescale[i / 2];
            }
        }
        UNROLL
        for (int n = 0; n < STEP / 16; n++) {
            uint32_t p[4] = {pack<T>(scores[2 * n][0], scores[2 * n][1]),
                             pack<T>(scores[2 * n][2], scores[2 * n][3]),
                             pack<T>(scores[2 * n + 1][0], scores[2 * n + 1][1]),
                             pack<T>(scores[2 * n + 1][2], scores[2 * n + 1][3])};
            UNROLL
            for (int d = 0; d < SIZE / 16; d++) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, values + (n * 16 + lane / 8 % 2 * 8 + lane % 8) * STRIDE +
                                         (d * 2 + lane / 16) * 16);
                uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma_m16n8k16<T>(out[2 * d], p, b0);
                mma_m16n8k16<T>(out[2 * d + 1], p, b1);
            }
        }
        block_sync(); // the next copies overwrite what all warps have now read
    }
    griddep_launch_dependents();
    uint32_t queries[2] = {q0, q1};
    store_results<T, SIZE>(a, first_token, queries, count, head, &out[0][0], softmax.sum);
}

#define ATTENTION_PREFILL(T, SIZE)                                         \
    KERNEL(attention_prefill_##T##_##SIZE, WARPS* WARP)(AttentionArgs a) { \
        attention_prefill<T, SIZE>(a);                                     \
    }                                                                      \
    EXPORT(attention_prefill_##T##_##SIZE)
#define ATTENTION_PREFILL_ALL(T) \
    ATTENTION_PREFILL(T, 32)     \
    ATTENTION_PREFILL(T, 64)     \
    ATTENTION_PREFILL(T, 80)     \
    ATTENTION_PREFILL(T, 96)     \
    ATTENTION_PREFILL(T, 128)
ATTENTION_PREFILL_ALL(bf16)
ATTENTION_PREFILL_ALL(f16)
