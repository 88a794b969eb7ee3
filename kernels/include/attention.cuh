// What the attention kernels share.
#pragma once
#include "numbers.cuh"

constexpr int BLOCK = 16; // positions of a cache block

// Laid out as `Attention` in src/ops/cuda/attention.rs.
struct Attention {
    void* out;
    const void *q, *keys, *values;
    const uint32_t* tokens;    // one query at a time: which
    const uint32_t* tiles;     // many queries at a time: first token and how many, by pairs
    const uint32_t* spans;     // of each token: its sequence's row of `tables`
    const uint32_t* positions; // of each token
    const uint32_t* tables;    // [sequence, table_width]: cache blocks
    const float* slopes;       // [head]
    float* partials;    // [query, head, split, size + 2]: sums, largest score, sum of weights
    uint32_t* counters; // [query, head], zero; left zero
    uint32_t heads, table_width, splits, unused;
};
