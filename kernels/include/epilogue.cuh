// What a product does with its sums.
#pragma once
#include "numbers.cuh"

enum EpilogueMode : uint32_t {
    BIAS = 0,     // out f32 = sum + bias
    GELU = 1,     // out 16 bits = gelu(sum + bias), tanh form
    RESIDUAL = 2, // out f32 = sum + bias + residual
    // rows are [head, 3, head size]: queries to out in 16 bits, keys and values to their cache
    // blocks
    QKV = 3,
};

// Laid out as `Epilogue` in src/ops/cuda/linear.rs.
struct Epilogue {
    void* out;            // [tokens, width], for QKV [tokens, width / 3]
    const float* bias;    // [width]
    const void* residual; // [tokens, width], in f32 or 16 bits
    void* keys;           // this layer's cache: [block, head, 16, head size]
    void* values;
    const uint32_t* slots; // of each token: block * 16 + position in the block
    uint32_t mode, width, narrow_residual, heads, head_size, unused;
};

DEVICE float gelu(float x) {
    float u = 0.79788456f * x * (1.0f + 0.044715f * x * x);
#ifdef KERNEL_EMULATOR
    return x / (1.0f + expf(-2.0f * u));
#else
    // far within the rounding to 16 bits that follows
    return __fdividef(x, 1.0f + __expf(-2.0f * u));
#endif
}

// Whether results are 16 bits wide.
DEVICE bool narrow_result(const Epilogue& e) { return e.mode == GELU || e.mode == QKV; }

// Where the 16-bit result of a token's output `row` goes. Head sizes are multiples of 8: so many
// neighbours from a multiple of 8 on lie side by side.
template <class T>
DEVICE T* narrow_place(const Epilogue& e, uint32_t token, uint32_t row) {
    if (e.mode == GELU) return static_cast<T*>(e.out) + static_cast<size_t>(token) * e.width + row;
    uint32_t head = row / (3 * e.head_size), part = row / e.head_size % 3, d = row % e.head_size;
    if (part == 0)
        return static_cast<T*>(e.out) +
               (static_cast<size_t>(token) * e.heads + head) * e.head_size + d;
    uint32_t slot = e.slots[token];
    size_t place = (static_cast<size_t>(slot / 16) * e.heads + head) * 16 + slot % 16;
    return static_cast<T*>(part == 1 ? e.keys : e.values) + place * e.head_size + d;
}

// Writes two neighbouring sums (outputs `row` and `row + 1`, `row` even) of a token. `second` is
// false if there is no second.
template <class T>
DEVICE void finish_pair(const Epilogue& e, uint32_t token, uint32_t row, float a, float b,
                        bool second) {
    a += e.bias[row];
    if (second) b += e.bias[row + 1];
    if (e.mode == QKV) {
        *reinterpret_cast<uint32_t*>(narrow_place<T>(e, token, row)) = pack<T>(a, b);
        return;
    }
    if (e.mode == GELU) {
        T* out = narrow_place<T>(e, token, row);
        out[0] = narrow<T>(gelu(a));
        if (second) out[1] = narrow<T>(gelu(b));
        return;
    }
    size_t at = static_cast<size_t>(token) * e.width + row;
    if (e.mode == RESIDUAL) {
        if (e.narrow_residual) {
            const T* r = static_cast<const T*>(e.residual) + at;
            a += to_float(r[0]);
            if (second) b += to_float(r[1]);
        } else {
            const float* r = static_cast<const float*>(e.residual) + at;
            a += r[0];
            if (second) b += r[1];
        }
    }
    float* out = static_cast<float*>(e.out) + at;
    out[0] = a;
    if (second) out[1] = b;
}

// Writes eight neighbouring sums of a token from output `row` on, a multiple of 8 as the width is.
template <class T>
DEVICE void finish_eight(const Epilogue& e, uint32_t token, uint32_t row, float (&v)[8]) {
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        Four bias = *reinterpret_cast<const Four*>(e.bias + row + i);
        UNROLL
        for (int j = 0; j < 4; j++) v[i + j] += bias.v[j];
    }
    if (narrow_result(e)) {
        Eight out;
        UNROLL
        for (int i = 0; i < 8; i += 2) {
            out.pairs[i / 2] =
                e.mode == GELU ? pack<T>(gelu(v[i]), gelu(v[i + 1])) : pack<T>(v[i], v[i + 1]);
        }
        *reinterpret_cast<Eight*>(narrow_place<T>(e, token, row)) = out;
        return;
    }
    size_t at = static_cast<size_t>(token) * e.width + row;
    if (e.mode == RESIDUAL && e.narrow_residual) {
        Eight r = *reinterpret_cast<const Eight*>(static_cast<const T*>(e.residual) + at);
        UNROLL
        for (int i = 0; i < 8; i += 2) {
            v[i] += low<T>(r.pairs[i / 2]);
            v[i + 1] += high<T>(r.pairs[i / 2]);
        }
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        Four out = {{v[i], v[i + 1], v[i + 2], v[i + 3]}};
        if (e.mode == RESIDUAL && !e.narrow_residual) {
            Four r = *reinterpret_cast<const Four*>(static_cast<const float*>(e.residual) + at + i);
            UNROLL
            for (int j = 0; j < 4; j++) out.v[j] += r.v[j];
        }
        *reinterpret_cast<Four*>(static_cast<float*>(e.out) + at + i) = out;
    }
}
