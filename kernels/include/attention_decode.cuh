// Attention over the paged KV cache with ALiBi, one query at a time (after FlashDecoding, Dao et
// al. 2023): what the kernels attention_decode_* and decode_step_* share.
//
//   q [tokens, head, size] and out [tokens, head, size] in 16 bits
//   keys and values [block, head, 16, size] in 16 bits
//
// Least bytes: the keys and values of the sequence, once for each query: 4 * positions * size for
// each head. FLOPs: 4 * positions * size.
// A sequence longer than SPLIT is divided among several thread blocks; the last of them to finish
// adds up the partial results, in order. A warp takes a cache block of 16 positions at a time and
// computes on the tensor cores, although there is only one query: keys times a query that is
// repeated in all eight columns, then values times softmax weights that are repeated in the same
// way. Most of the results are duplicates, but no operand has to be converted or unpacked: the 16
// bytes that a lane loads are the operand itself (keys), or two such loads interleaved (values),
// and every lane ends up with the scores of two positions. Instructions then take less time than
// memory. The order of every sum depends on the length of the sequence alone.
#pragma once
#include "memory.cuh"
#include "mma.cuh"
#include "threads.cuh"

// The factors that bring two partial softmax results to a common maximum.
DEVICE void merge_scales(float max_score, float other, float& mine, float& theirs, float& both) {
    both = fmaxf(max_score, other);
    mine = max_score == -INFINITY ? 0.0f : expf(max_score - both);
    theirs = other == -INFINITY ? 0.0f : expf(other - both);
}

// Element `j` of `a` and element `j` of `b` as a pair.
DEVICE uint32_t interleave(const Pack16B& a, const Pack16B& b, int j) {
    uint32_t x = a.pairs[j / 2], y = b.pairs[j / 2];
    return byte_perm(x, y, j % 2 == 0 ? 0x5410 : 0x7632);
}

// The first of the eight columns that a lane loads in a step of `columns` columns. Lanes beyond the
// head size load what other lanes load too.
template <int SIZE>
DEVICE uint32_t column_of_lane(int step, int columns, int lane) {
    int left = SIZE - step * columns, chunks = (left < columns ? left : columns) / 8;
    return step * columns + lane % chunks * 8;
}

// What a block knows of a query before it computes: none of it depends on the layer.
struct DecodeQuery {
    uint32_t token, position;
    uint32_t blocks; // the cache block that this warp takes in the step of this lane's number
    float slope;
};
// Loads it for one head of query `number` and one split of the positions.
template <int WARPS, int SPLIT>
DEVICE DecodeQuery load_decode_query(const AttentionArgs& a, uint32_t head, uint32_t number,
                                     uint32_t split) {
    static_assert(SPLIT / CACHE_BLOCK / WARPS <= WARP, "a lane for each step of a warp");
    DecodeQuery q = {};
    q.token = a.tokens[number];
    q.position = a.positions[q.token];
    q.slope = a.slopes[head];
    const uint32_t* table = a.tables + static_cast<size_t>(a.spans[q.token]) * a.table_width;
    uint32_t step = warp_index() + lane_index() * WARPS, b = split * SPLIT / CACHE_BLOCK + step;
    if (step < SPLIT / CACHE_BLOCK && b * CACHE_BLOCK <= q.position) q.blocks = table[b];
    return q;
}

// Computes one head of query `number` over one split of the positions, by a block of WARPS warps.
// `shared` has room for WARPS * (SIZE + 2) + 1 floats. A split beyond the query's positions does
// nothing.
template <class T, int SIZE, int WARPS, int SPLIT>
DEVICE void attention_decode(const AttentionArgs& a, const DecodeQuery& of, uint32_t head,
                             uint32_t number, uint32_t split, float* shared) {
    // a step loads 32 columns, 8 in each of four lanes
    constexpr int KEY_STEPS = (SIZE + 31) / 32;
    // a step loads 64 columns, 8 in each of eight groups of lanes
    constexpr int VALUE_STEPS = (SIZE + 63) / 64;
    uint32_t token = of.token, position = of.position;
    uint32_t first = split * SPLIT;
    if (first > position) return; // this sequence has fewer splits than the longest of the batch
    uint32_t splits = position / SPLIT + 1;
    uint32_t end = position + 1 < first + SPLIT ? position + 1 : first + SPLIT;
    int g = lane_index() / 4, t = lane_index() % 4;
    const float scale = 1.0f / sqrtf(static_cast<float>(SIZE));
    const T* query =
        static_cast<const T*>(a.q) + (static_cast<size_t>(token) * a.heads + head) * SIZE;
    // The 16 bytes that a lane loads of a key serve as two rows of the operand: pairs 0 and 2 as
    // the first, pairs 1 and 3 as the second. Even columns of the other operand hold the query's
    // pairs that belong to the first row, odd columns those of the second.
    uint32_t q[KEY_STEPS][2];
    UNROLL
    for (int i = 0; i < KEY_STEPS; i++) {
        Pack16B chunk = {}; // stays zero in lanes whose keys are duplicates
        if (i * 32 + t * 8 < SIZE)
            chunk = load(reinterpret_cast<const Pack16B*>(query + i * 32 + t * 8));
        q[i][0] = g % 2 == 0 ? chunk.pairs[0] : chunk.pairs[1];
        q[i][1] = g % 2 == 0 ? chunk.pairs[2] : chunk.pairs[3];
    }
    // columns 64 i + 8 g + 2 j and + 1 are in [i][j][0] and [i][j][2]
    float accumulators[VALUE_STEPS][4][4] = {};
    float max_score = -INFINITY, sum_exp = 0;
    for (uint32_t step = 0, b = first / CACHE_BLOCK + warp_index(); b * CACHE_BLOCK < end;
         step++, b += WARPS) {
        uint32_t count = end - b * CACHE_BLOCK; // positions from this block on
        size_t offset =
            (static_cast<size_t>(shuffle(of.blocks, step)) * a.heads + head) * CACHE_BLOCK * SIZE;
        const char* keys = opaque_address(static_cast<const T*>(a.keys) + offset);
        const char* values = opaque_address(static_cast<const T*>(a.values) + offset);
        // rows beyond the last position load the last one again; their weights are zero
        auto start_of = [&](uint32_t row) { return (row < count ? row : count - 1) * SIZE * 2; };
        Pack16B k[2][KEY_STEPS], v[4][VALUE_STEPS];
        UNROLL
        for (int half = 0; half < 2; half++) {
            uint32_t start = start_of(half * 8 + g);
            UNROLL
            for (int i = 0; i < KEY_STEPS; i++) {
                k[half][i] = load(reinterpret_cast<const Pack16B*>(
                    keys + start + column_of_lane<SIZE>(i, 32, t) * 2));
            }
        }
        UNROLL
        for (int r = 0; r < 4; r++) {
            uint32_t start = start_of(2 * t + r / 2 + r % 2 * 8);
            UNROLL
            for (int i = 0; i < VALUE_STEPS; i++) {
                v[r][i] = load(reinterpret_cast<const Pack16B*>(
                    values + start + column_of_lane<SIZE>(i, 64, g) * 2));
            }
        }
        float score[2]; // scores of positions g and g + 8
        UNROLL
        for (int half = 0; half < 2; half++) {
            float partial_scores[4] = {};
            UNROLL
            for (int i = 0; i < KEY_STEPS; i++)
                mma_m16n8k16<T>(partial_scores, k[half][i].pairs, q[i]);
            uint32_t row = half * 8 + g;
            float distance =
                static_cast<float>(b * CACHE_BLOCK + row) - static_cast<float>(position);
            score[half] =
                row < count ? (partial_scores[0] + partial_scores[3]) * scale + of.slope * distance
                            : -INFINITY;
        }
        float new_max = fmaxf(score[0], score[1]);
        for (int mask = 4; mask < WARP; mask *= 2)
            new_max = fmaxf(new_max, shuffle_xor(new_max, mask));
        if (new_max > max_score) { // a decision that all lanes share
            float rescale = expf(max_score - new_max);
            sum_exp *= rescale;
            UNROLL
            for (int i = 0; i < VALUE_STEPS; i++) {
                UNROLL
                for (int j = 0; j < 4; j++) {
                    accumulators[i][j][0] *= rescale;
                    accumulators[i][j][2] *= rescale;
                }
            }
            max_score = new_max;
        }
        float w[2] = {expf(score[0] - max_score), expf(score[1] - max_score)};
        sum_exp += w[0] + w[1];
        // the weights in the order in which the values are interleaved: positions 2 t and 2 t + 8,
        // then 2 t + 1 and 2 t + 9
        uint32_t both = pack<T>(w[0], w[1]);
        uint32_t column[2] = {shuffle(both, 8 * t), shuffle(both, 8 * t + 4)};
        UNROLL
        for (int i = 0; i < VALUE_STEPS; i++) {
            UNROLL
            for (int j = 0; j < 4; j++) {
                uint32_t rows[4] = {
                    interleave(v[0][i], v[1][i], 2 * j), interleave(v[0][i], v[1][i], 2 * j + 1),
                    interleave(v[2][i], v[3][i], 2 * j), interleave(v[2][i], v[3][i], 2 * j + 1)};
                mma_m16n8k16<T>(accumulators[i][j], rows, column);
            }
        }
    }
    for (int mask = 4; mask < WARP; mask *= 2) sum_exp += shuffle_xor(sum_exp, mask);
    // the warps' results, added in order
    float* row = shared + warp_index() * (SIZE + 2);
    if (t == 0) {
        UNROLL
        for (int i = 0; i < VALUE_STEPS; i++) {
            int column = i * 64 + 8 * g;
            UNROLL
            for (int j = 0; j < 4; j++) {
                if (column < SIZE) row[column + 2 * j] = accumulators[i][j][0];
                if (column < SIZE) row[column + 2 * j + 1] = accumulators[i][j][2];
            }
        }
        if (g == 0) {
            row[SIZE] = max_score;
            row[SIZE + 1] = sum_exp;
        }
    }
    block_sync();
    T* out = static_cast<T*>(a.out) + (static_cast<size_t>(token) * a.heads + head) * SIZE;
    size_t index = static_cast<size_t>(number) * a.heads + head;
    float* partial = a.partials + (index * a.splits + split) * (SIZE + 2);
    for (int d = threadIdx.x; d < SIZE; d += WARPS * WARP) {
        float sum = shared[d], m = shared[SIZE], l = shared[SIZE + 1];
        for (int w = 1; w < WARPS; w++) {
            const float* r = shared + w * (SIZE + 2);
            float mine, theirs, both;
            merge_scales(m, r[SIZE], mine, theirs, both);
            sum = sum * mine + r[d] * theirs;
            l = l * mine + r[SIZE + 1] * theirs;
            m = both;
        }
        if (splits == 1) {
            out[d] = to_half<T>(sum / l);
        } else {
            partial[d] = sum;
            if (d == 0) {
                partial[SIZE] = m;
                partial[SIZE + 1] = l;
            }
        }
    }
    if (splits == 1) return;
    // the last block to finish adds up all partial results, in order
    block_sync();
    uint32_t* last = reinterpret_cast<uint32_t*>(shared + WARPS * (SIZE + 2));
    if (threadIdx.x == 0) {
        *last = atomic_increment(&a.counters[index]) == splits - 1;
        if (*last) a.counters[index] = 0;
    }
    block_sync();
    if (!*last) return;
    for (int d = threadIdx.x; d < SIZE; d += WARPS * WARP) {
        float sum = 0, m = -INFINITY, l = 0;
        for (uint32_t s = 0; s < splits; s++) {
            const float* r = a.partials + (index * a.splits + s) * (SIZE + 2);
            float mine, theirs, both;
            merge_scales(m, r[SIZE], mine, theirs, both);
            sum = sum * mine + r[d] * theirs;
            l = l * mine + r[SIZE + 1] * theirs;
            m = both;
        }
        out[d] = to_half<T>(sum / l);
    }
}
