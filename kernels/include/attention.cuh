// The arguments that all attention kernels take.
#pragma once
#include "numbers.cuh"

constexpr int BLOCK = 16; // positions in a block of the KV cache

// Laid out as `Attention` in src/ops/cuda/attention.rs.
struct AttentionArgs {
    void* out;
    const void *q, *keys, *values;
    const uint32_t* tokens; // [query]: its token, for kernels that take one query at a time
    // [tile]: first token and number of tokens, for kernels that take many queries at a time
    const uint32_t* tiles;
    const uint32_t* spans;     // [token]: the row of `tables` of its sequence
    const uint32_t* positions; // [token]: its position in its sequence
    const uint32_t* tables;    // [sequence, table_width]: numbers of cache blocks
    const float* slopes;       // [head]: of ALiBi
    // [query, head, split, size + 2]: unnormalized output, maximal score, sum of exponentials
    float* partials;
    uint32_t* counters; // [query, head]: zeros before and after the launch
    uint32_t heads, table_width, splits, unused;
};
