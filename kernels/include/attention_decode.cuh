// Attention over the paged KV cache with ALiBi, one query at a time: what `attend` and `decode_step` share.
//
//   q [tokens, head, size] in 16 bits; keys, values [block, head, 16, size]; out [tokens, head, size] in 16 bits
//
// Least bytes: keys and values of the sequence once a query (decoding: 4 * positions * size bytes a head). Sequences longer than
// SPLIT are shared by several blocks of threads, whose partial results the last one to end adds up in order. Inside, a warp
// takes every WARPS-th cache block: two lanes share a position, each with every other 16-byte piece, so that a pair reads
// whole sectors. A lane keeps its own running softmax and its own sums over the positions it has seen; lanes meet only at the
// end. The order of every sum depends on the sequence's own length alone.
#pragma once
#include "attention.cuh"
#include "memory.cuh"
#include "threads.cuh"

// Brings two softmax sums to one largest score.
DEVICE void scales_to_merge(float most, float other, float& mine, float& theirs, float& both) {
    both = fmaxf(most, other);
    mine = most == -INFINITY ? 0.0f : expf(most - both);
    theirs = other == -INFINITY ? 0.0f : expf(other - both);
}

// One head of query `number` and its split of the positions, by a block of WARPS warps. Shared memory: WARPS * (SIZE + 2) + 1
// words at `shared`. Splits beyond the query's positions do nothing.
template <class T, int SIZE, int WARPS, int SPLIT>
DEVICE void attend(const Attention& a, uint32_t head, uint32_t number, uint32_t split, float* shared) {
    constexpr int PIECES = SIZE / 16; // 16-byte pieces of a lane
    uint32_t token = a.tokens[number];
    uint32_t position = a.positions[token];
    uint32_t first = split * SPLIT;
    if (first > position) return; // this sequence needs fewer blocks than the batch's longest
    uint32_t blocks_of_query = position / SPLIT + 1;
    uint32_t end = position + 1 < first + SPLIT ? position + 1 : first + SPLIT;
    const uint32_t* table = a.tables + static_cast<size_t>(a.spans[token]) * a.table_width;
    float slope = a.slopes[head];
    int pair = lane_index() / 2, side = lane_index() % 2;
    const float scale = 1.0f / sqrtf(static_cast<float>(SIZE));
    const T* query = static_cast<const T*>(a.q) + (static_cast<size_t>(token) * a.heads + head) * SIZE;
    Eight q[PIECES];
    UNROLL
    for (int i = 0; i < PIECES; i++) q[i] = load(reinterpret_cast<const Eight*>(query + (2 * i + side) * 8));
    float sums[PIECES * 8] = {};
    float most = -INFINITY, weight = 0;
    for (uint32_t b = first / BLOCK + warp_index(); b * BLOCK < end; b += WARPS) {
        uint32_t at = b * BLOCK + pair;
        bool valid = at < end;
        size_t place = ((static_cast<size_t>(table[b]) * a.heads + head) * BLOCK + pair) * SIZE;
        const T* key = static_cast<const T*>(a.keys) + place;
        const T* value = static_cast<const T*>(a.values) + place;
        Eight k[PIECES], v[PIECES];
        UNROLL
        for (int i = 0; i < PIECES; i++) {
            k[i] = v[i] = Eight{};
            if (valid) {
                k[i] = load(reinterpret_cast<const Eight*>(key + (2 * i + side) * 8));
                v[i] = load(reinterpret_cast<const Eight*>(value + (2 * i + side) * 8));
            }
        }
        float dot = 0;
        UNROLL
        for (int i = 0; i < PIECES; i++) {
            UNROLL
            for (int j = 0; j < 4; j++) {
                dot += low<T>(q[i].pairs[j]) * low<T>(k[i].pairs[j]);
                dot += high<T>(q[i].pairs[j]) * high<T>(k[i].pairs[j]);
            }
        }
        dot += shuffle_xor(dot, 1);
        if (valid) {
            float score = dot * scale + slope * (static_cast<float>(at) - static_cast<float>(position));
            if (score > most) {
                float shrink = most == -INFINITY ? 0.0f : expf(most - score);
                weight *= shrink;
                UNROLL
                for (int i = 0; i < PIECES * 8; i++) sums[i] *= shrink;
                most = score;
            }
            float w = expf(score - most);
            weight += w;
            UNROLL
            for (int i = 0; i < PIECES; i++) {
                UNROLL
                for (int j = 0; j < 4; j++) {
                    sums[i * 8 + 2 * j] += w * low<T>(v[i].pairs[j]);
                    sums[i * 8 + 2 * j + 1] += w * high<T>(v[i].pairs[j]);
                }
            }
        }
    }
    // lanes of a warp: the pairs among themselves, sides apart
    for (int mask = 2; mask < WARP; mask *= 2) {
        float mine, theirs, both;
        scales_to_merge(most, shuffle_xor(most, mask), mine, theirs, both);
        float other = shuffle_xor(weight, mask);
        weight = weight * mine + other * theirs;
        UNROLL
        for (int i = 0; i < PIECES * 8; i++) {
            float x = shuffle_xor(sums[i], mask);
            sums[i] = sums[i] * mine + x * theirs;
        }
        most = both;
    }
    // the warps, in order
    float* row = shared + warp_index() * (SIZE + 2);
    if (lane_index() < 2) {
        UNROLL
        for (int i = 0; i < PIECES * 8; i++) row[(2 * (i / 8) + side) * 8 + i % 8] = sums[i];
        if (lane_index() == 0) {
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
