// Attention over the paged KV cache with ALiBi, many queries of a sequence at a time (after
// FlashAttention-2, Dao 2023).
//
//   q [tokens, head, size] and out [tokens, head, size] in 16 bits
//   keys and values [block, head, 16, size] in 16 bits
//
// FLOPs: 4 * size for each query and position it sees; least bytes: queries and results once, keys
// and values once for each 64 queries. A block takes one head of 64 queries in 4 warps of 16 and
// walks the sequence's positions by 64: scores and weighted sums on the tensor cores, softmax in
// registers as positions come, copies of the next positions behind the work on these. Rows in
// shared memory are 16 bytes longer than a head, so that the operands' loads meet no bank twice.
// Steps begin at multiples of 64 positions: a query's result does not depend on which queries share
// its block.
#include "attention_tiles.cuh"
#include "memory.cuh"
#include "tensor_core.cuh"

constexpr int WARPS = 4; // 16 queries each
constexpr int STEP = 64; // positions

// Copies keys and values of the positions from `first` on; zeros from `end` on.
template <class T, int SIZE>
DEVICE void load_step(char* keys, char* values, const Attention& a, const uint32_t* table,
                      uint32_t head, uint32_t first, uint32_t end) {
    constexpr int STRIDE = SIZE * 2 + 16;
    constexpr int PIECES = SIZE / 8;
    for (int i = threadIdx.x; i < STEP * PIECES; i += WARPS * WARP) {
        int r = i / PIECES, c = i % PIECES;
        uint32_t position = first + r;
        bool valid = position < end;
        size_t block = valid ? table[position / BLOCK] : 0;
        size_t at = ((block * a.heads + head) * BLOCK + position % BLOCK) * SIZE + c * 8;
        copy_async(keys + r * STRIDE + c * 16, static_cast<const T*>(a.keys) + at, valid);
        copy_async(values + r * STRIDE + c * 16, static_cast<const T*>(a.values) + at, valid);
    }
}

template <class T, int SIZE>
DEVICE void attend_many(const Attention& a) {
    constexpr int STRIDE = SIZE * 2 + 16;
    constexpr int STAGE = 2 * STEP * STRIDE;
    uint32_t head = blockIdx.x;
    char* shared = shared_memory();
    wait_for_earlier_kernels();
    uint32_t first_token = a.tiles[2 * blockIdx.y], count = a.tiles[2 * blockIdx.y + 1];
    uint32_t first_position = a.positions[first_token];
    uint32_t end = first_position + count;
    const uint32_t* table = a.tables + static_cast<size_t>(a.spans[first_token]) * a.table_width;
    int steps = (end + STEP - 1) / STEP;
    load_step<T, SIZE>(shared, shared + STEP * STRIDE, a, table, head, 0, end);
    copy_commit();
    int lane = lane_index(), g = lane / 4, t = lane % 4;
    // this warp's 16 queries, of which a lane works on two; rows beyond the last query repeat it
    uint32_t q0 = warp_index() * 16 + g, q1 = q0 + 8;
    uint32_t rows[2] = {q0 < count ? q0 : count - 1, q1 < count ? q1 : count - 1};
    uint32_t q[SIZE / 16][4];
    load_queries<T, SIZE>(q, a, first_token, rows, head);
    const float scale = 1.0f / sqrtf(static_cast<float>(SIZE));
    float slope = a.slopes[head];
    float out[SIZE / 8][4] = {};
    float most[2] = {-INFINITY, -INFINITY}, weight[2] = {0, 0};
    for (int s = 0; s < steps; s++) {
        char* keys = shared + s % 2 * STAGE;
        char* values = keys + STEP * STRIDE;
        if (s + 1 < steps) {
            char* next = shared + (s + 1) % 2 * STAGE;
            load_step<T, SIZE>(next, next + STEP * STRIDE, a, table, head, (s + 1) * STEP, end);
        }
        copy_commit();
        copy_wait<1>();
        sync_block();
        float scores[STEP / 8][4] = {};
        UNROLL
        for (int i = 0; i < SIZE / 16; i++) {
            UNROLL
            for (int n = 0; n < STEP / 16; n++) {
                uint32_t b[4];
                load_matrices(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * STRIDE +
                                     (i * 2 + lane / 8 % 2) * 16);
                uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                multiply<T>(scores[2 * n], q[i], b0);
                multiply<T>(scores[2 * n + 1], q[i], b1);
            }
        }
        UNROLL
        for (int half = 0; half < 2; half++) {
            uint32_t position = first_position + rows[half];
            float best = most[half];
            UNROLL
            for (int n = 0; n < STEP / 8; n++) {
                UNROLL
                for (int j = 0; j < 2; j++) {
                    uint32_t key = s * STEP + n * 8 + 2 * t + j;
                    float& x = scores[n][2 * half + j];
                    x = x * scale +
                        slope * (static_cast<float>(key) - static_cast<float>(position));
                    if (key > position) x = -INFINITY;
                    best = fmaxf(best, x);
                }
            }
            // a row's positions lie in four neighbouring lanes; every query sees position 0, so
            // that `best` is a number
            best = fmaxf(best, shuffle_xor(best, 1));
            best = fmaxf(best, shuffle_xor(best, 2));
            float shrink = expf(most[half] - best), sum = 0;
            most[half] = best;
            UNROLL
            for (int n = 0; n < STEP / 8; n++) {
                UNROLL
                for (int j = 0; j < 2; j++) {
                    float& x = scores[n][2 * half + j];
                    x = expf(x - best);
                    sum += x;
                }
            }
            weight[half] = weight[half] * shrink + sum;
            UNROLL
            for (int d = 0; d < SIZE / 8; d++) {
                out[d][2 * half] *= shrink;
                out[d][2 * half + 1] *= shrink;
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
                load_matrices_transposed(b, values +
                                                (n * 16 + lane / 8 % 2 * 8 + lane % 8) * STRIDE +
                                                (d * 2 + lane / 16) * 16);
                uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                multiply<T>(out[2 * d], p, b0);
                multiply<T>(out[2 * d + 1], p, b1);
            }
        }
        sync_block(); // the next copies overwrite what was read here
    }
    let_next_kernel_begin();
    uint32_t queries[2] = {q0, q1};
    store_results<T, SIZE>(a, first_token, queries, count, head, &out[0][0], weight);
}

#define ATTEND_MANY(T, SIZE)                                                                \
    KERNEL(attend_many_##T##_##SIZE, WARPS* WARP)(Attention a) { attend_many<T, SIZE>(a); } \
    EXPORT(attend_many_##T##_##SIZE)
#define ATTEND_MANY_ALL(T) \
    ATTEND_MANY(T, 32)     \
    ATTEND_MANY(T, 64)     \
    ATTEND_MANY(T, 80)     \
    ATTEND_MANY(T, 96)     \
    ATTEND_MANY(T, 128)
ATTEND_MANY_ALL(bf16)
ATTEND_MANY_ALL(f16)
