// Attention over the paged KV cache with ALiBi, one query at a time: what `attend` and
// `decode_step` share.
//
//   q [tokens, head, size] and out [tokens, head, size] in 16 bits
//   keys and values [block, head, 16, size] in 16 bits
//
// Least bytes: keys and values of the sequence once a query (decoding: 4 * positions * size bytes a
// head). Sequences longer than SPLIT are shared by several blocks of threads, whose partial results
// the last one to end adds up in order. Inside, a warp takes a block of the cache at a time, 16
// positions, and multiplies on the tensor cores: keys times a query that stands in all eight
// columns, then values times weights that do. Most of the products are the same, but nothing has to
// be unpacked: each lane's 16-byte loads are operands as they are (keys), or two of them woven
// together (values), and every lane has the scores of two positions. So instructions take less time
// than the memory. The order of every sum depends on the sequence's own length alone.
#pragma once
#include "attention.cuh"
#include "memory.cuh"
#include "tensor_core.cuh"
#include "threads.cuh"

// Brings two softmax sums to one largest score.
DEVICE void scales_to_merge(float most, float other, float& mine, float& theirs, float& both) {
    both = fmaxf(most, other);
    mine = most == -INFINITY ? 0.0f : expf(most - both);
    theirs = other == -INFINITY ? 0.0f : expf(other - both);
}

// Elements `j` of two pieces of eight.
DEVICE uint32_t weave(const Eight& a, const Eight& b, int j) {
    uint32_t x = a.pairs[j / 2], y = b.pairs[j / 2];
#ifdef KERNEL_EMULATOR
    return j % 2 == 0 ? (x & 0xffff) | y << 16 : x >> 16 | (y & 0xffff0000);
#else
    return __byte_perm(x, y, j % 2 == 0 ? 0x5410 : 0x7632);
#endif
}

// An address that the compiler takes as it is: 32-bit offsets are added to it, instead of the whole
// being multiplied out in 64 bits.
DEVICE const char* kept_apart(const void* address) {
#ifndef KERNEL_EMULATOR
    asm("" : "+l"(address));
#endif
    return static_cast<const char*>(address);
}

// The column where a lane reads 16 bytes in a step of `columns` columns: lanes beyond the head read
// what others do.
template <int SIZE>
DEVICE uint32_t column_of_lane(int step, int columns, int lane) {
    int left = SIZE - step * columns, pieces = (left < columns ? left : columns) / 8;
    return step * columns + lane % pieces * 8;
}

// One head of query `number` and its split of the positions, by a block of WARPS warps. Shared
// memory: WARPS * (SIZE + 2) + 1 words at `shared`. Splits beyond the query's positions do nothing.
template <class T, int SIZE, int WARPS, int SPLIT>
DEVICE void attend(const Attention& a, uint32_t head, uint32_t number, uint32_t split,
                   float* shared) {
    // a step: 32 columns, 8 in each of four lanes
    constexpr int KEY_STEPS = (SIZE + 31) / 32;
    // a step: 64 columns, 8 in each of eight groups of lanes
    constexpr int VALUE_STEPS = (SIZE + 63) / 64;
    uint32_t token = a.tokens[number];
    uint32_t position = a.positions[token];
    uint32_t first = split * SPLIT;
    if (first > position) return; // this sequence needs fewer blocks than the batch's longest
    uint32_t blocks_of_query = position / SPLIT + 1;
    uint32_t end = position + 1 < first + SPLIT ? position + 1 : first + SPLIT;
    const uint32_t* table = a.tables + static_cast<size_t>(a.spans[token]) * a.table_width;
    float slope = a.slopes[head];
    int g = lane_index() / 4, t = lane_index() % 4;
    const float scale = 1.0f / sqrtf(static_cast<float>(SIZE));
    const T* query =
        static_cast<const T*>(a.q) + (static_cast<size_t>(token) * a.heads + head) * SIZE;
    // a lane's 16 bytes of a key are two rows of the product, pairs 0 and 2 in one and 1 and 3 in
    // the other: even columns are the query's pairs for the first, odd ones for the second
    uint32_t q[KEY_STEPS][2];
    UNROLL
    for (int i = 0; i < KEY_STEPS; i++) {
        Eight piece = {}; // where lanes read what others do
        if (i * 32 + t * 8 < SIZE)
            piece = load(reinterpret_cast<const Eight*>(query + i * 32 + t * 8));
        q[i][0] = g % 2 == 0 ? piece.pairs[0] : piece.pairs[1];
        q[i][1] = g % 2 == 0 ? piece.pairs[2] : piece.pairs[3];
    }
    float sums[VALUE_STEPS][4][4] = {}; // of columns 64 i + 8 g + 2 j and + 1, in [i][j][0] and [2]
    float most = -INFINITY, weight = 0;
    for (uint32_t b = first / BLOCK + warp_index(); b * BLOCK < end; b += WARPS) {
        uint32_t count = end - b * BLOCK; // of the positions from here on
        size_t place = (static_cast<size_t>(table[b]) * a.heads + head) * BLOCK * SIZE;
        const char* keys = kept_apart(static_cast<const T*>(a.keys) + place);
        const char* values = kept_apart(static_cast<const T*>(a.values) + place);
        // rows beyond the last position repeat it: their weight is zero
        auto start_of = [&](uint32_t row) { return (row < count ? row : count - 1) * SIZE * 2; };
        Eight k[2][KEY_STEPS], v[4][VALUE_STEPS];
        UNROLL
        for (int half = 0; half < 2; half++) {
            uint32_t start = start_of(half * 8 + g);
            UNROLL
            for (int i = 0; i < KEY_STEPS; i++) {
                k[half][i] = load(reinterpret_cast<const Eight*>(
                    keys + start + column_of_lane<SIZE>(i, 32, t) * 2));
            }
        }
        UNROLL
        for (int r = 0; r < 4; r++) {
            uint32_t start = start_of(2 * t + r / 2 + r % 2 * 8);
            UNROLL
            for (int i = 0; i < VALUE_STEPS; i++) {
                v[r][i] = load(reinterpret_cast<const Eight*>(values + start +
                                                              column_of_lane<SIZE>(i, 64, g) * 2));
            }
        }
        float score[2]; // of positions g and g + 8
        UNROLL
        for (int half = 0; half < 2; half++) {
            float products[4] = {};
            UNROLL
            for (int i = 0; i < KEY_STEPS; i++) multiply<T>(products, k[half][i].pairs, q[i]);
            uint32_t row = half * 8 + g;
            float distance = static_cast<float>(b * BLOCK + row) - static_cast<float>(position);
            score[half] =
                row < count ? (products[0] + products[3]) * scale + slope * distance : -INFINITY;
        }
        float highest = fmaxf(score[0], score[1]);
        for (int mask = 4; mask < WARP; mask *= 2)
            highest = fmaxf(highest, shuffle_xor(highest, mask));
        if (highest > most) { // so for all lanes or none
            float shrink = expf(most - highest);
            weight *= shrink;
            UNROLL
            for (int i = 0; i < VALUE_STEPS; i++) {
                UNROLL
                for (int j = 0; j < 4; j++) {
                    sums[i][j][0] *= shrink;
                    sums[i][j][2] *= shrink;
                }
            }
            most = highest;
        }
        float w[2] = {expf(score[0] - most), expf(score[1] - most)};
        weight += w[0] + w[1];
        // positions 2 t and 2 t + 8, then 2 t + 1 and 2 t + 9, as the values are woven
        uint32_t both = pack<T>(w[0], w[1]);
        uint32_t column[2] = {shuffle_from(both, 8 * t), shuffle_from(both, 8 * t + 4)};
        UNROLL
        for (int i = 0; i < VALUE_STEPS; i++) {
            UNROLL
            for (int j = 0; j < 4; j++) {
                uint32_t rows[4] = {
                    weave(v[0][i], v[1][i], 2 * j), weave(v[0][i], v[1][i], 2 * j + 1),
                    weave(v[2][i], v[3][i], 2 * j), weave(v[2][i], v[3][i], 2 * j + 1)};
                multiply<T>(sums[i][j], rows, column);
            }
        }
    }
    for (int mask = 4; mask < WARP; mask *= 2) weight += shuffle_xor(weight, mask);
    // the warps, in order
    float* row = shared + warp_index() * (SIZE + 2);
    if (t == 0) {
        UNROLL
        for (int i = 0; i < VALUE_STEPS; i++) {
            int column = i * 64 + 8 * g;
            UNROLL
            for (int j = 0; j < 4; j++) {
                if (column < SIZE) row[column + 2 * j] = sums[i][j][0];
                if (column < SIZE) row[column + 2 * j + 1] = sums[i][j][2];
            }
        }
        if (g == 0) {
            row[SIZE] = most;
            row[SIZE + 1] = weight;
        }
    }
    sync_block();
    T* out = static_cast<T*>(a.out) + (static_cast<size_t>(token) * a.heads + head) * SIZE;
    size_t index = static_cast<size_t>(number) * a.heads + head;
    float* partial = a.partials + (index * a.splits + split) * (SIZE + 2);
    for (int d = threadIdx.x; d < SIZE; d += WARPS * WARP) {
        float sum = shared[d], m = shared[SIZE], l = shared[SIZE + 1];
        for (int w = 1; w < WARPS; w++) {
            const float* r = shared + w * (SIZE + 2);
            float mine, theirs, both;
            scales_to_merge(m, r[SIZE], mine, theirs, both);
            sum = sum * mine + r[d] * theirs;
            l = l * mine + r[SIZE + 1] * theirs;
            m = both;
        }
        if (blocks_of_query == 1) {
            out[d] = narrow<T>(sum / l);
        } else {
            partial[d] = sum;
            if (d == 0) {
                partial[SIZE] = m;
                partial[SIZE + 1] = l;
            }
        }
    }
    if (blocks_of_query == 1) return;
    // the last block to come adds all up, in order
    sync_block();
    uint32_t* last = reinterpret_cast<uint32_t*>(shared + WARPS * (SIZE + 2));
    if (threadIdx.x == 0) {
        *last = count_up(&a.counters[index]) == blocks_of_query - 1;
        if (*last) a.counters[index] = 0;
    }
    sync_block();
    if (!*last) return;
    for (int d = threadIdx.x; d < SIZE; d += WARPS * WARP) {
        float sum = 0, m = -INFINITY, l = 0;
        for (uint32_t s = 0; s < blocks_of_query; s++) {
            const float* r = a.partials + (index * a.splits + s) * (SIZE + 2);
            float mine, theirs, both;
            scales_to_merge(m, r[SIZE], mine, theirs, both);
            sum = sum * mine + r[d] * theirs;
            l = l * mine + r[SIZE + 1] * theirs;
            m = both;
        }
        out[d] = narrow<T>(sum / l);
    }
}
