// What the kernels of linear layers share.
#pragma once
#include "numbers.cuh"

// The rows to multiply. Laid out as `Input` in src/ops/cuda/linear.rs.
struct Input {
    const void* x;       // [tokens, inputs] in 16 bits; f32 if there is a norm
    const float* weight; // of the norm; null if there is none
    const float* bias;
    void* normed;        // where the first block also writes the normalized rows; may be null
    float eps;
    uint32_t tokens, inputs, unused;
};
