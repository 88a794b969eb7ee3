// What a GEMM does with its accumulators: bias, activation, residual, and where results are
// written.
#pragma once
#include "numbers.cuh"

DEVICE float gelu(float x) {
    float u = 0.79788456f * x * (1.0f + 0.044715f * x * x);
    return divide_approx(x, 1.0f + exp_approx(-2.0f * u));
}

// The gradient of gelu(x).
DEVICE float gelu_gradient(float x) {
    float u = 0.79788456f * x * (1.0f + 0.044715f * x * x);
    // the sigmoid of 2 u, which is (1 + tanh(u)) / 2
    float s = divide_approx(1.0f, 1.0f + exp_approx(-2.0f * u));
    return s + x * 2.0f * s * (1.0f - s) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
}

// Whether the results are 16 bits wide.
DEVICE bool half_output(const EpilogueArgs& e) {
    return e.mode == EPILOGUE_GELU || e.mode == EPILOGUE_HALF || e.mode == EPILOGUE_QKV;
}

// Where the 16-bit result for output `row` of a token is written. Eight neighbours from a multiple
// of 8 on are contiguous, because head sizes are multiples of 8.
template <class T>
DEVICE T* half_output_at(const EpilogueArgs& e, uint32_t token, uint32_t row) {
    if (e.mode != EPILOGUE_QKV)
        return static_cast<T*>(e.out) + static_cast<size_t>(token) * e.width + row;
    uint32_t head = row / (3 * e.head_size), part = row / e.head_size % 3, d = row % e.head_size;
    if (part == 0)
        return static_cast<T*>(e.out) +
               (static_cast<size_t>(token) * e.heads + head) * e.head_size + d;
    uint32_t slot = e.slots[token];
    size_t slot_row = (static_cast<size_t>(slot / 16) * e.heads + head) * 16 + slot % 16;
    return static_cast<T*>(part == 1 ? e.keys : e.values) + slot_row * e.head_size + d;
}

// The same for many tokens, with the divisions done once. Elsewhere it would only be more code.
template <class T>
struct HalfOutput {
    T* first;        // of token 0, or of slot 0 of the cache
    uint32_t stride; // between tokens, or between blocks of the cache
    uint32_t cached; // in the cache the stride between slots of a block, elsewhere 0
    // `slot` is the token's, and means nothing outside of the cache.
    DEVICE_MEMBER T* at(uint32_t token, uint32_t slot) const {
        if (!cached) return first + static_cast<size_t>(token) * stride;
        return first + static_cast<size_t>(slot / CACHE_BLOCK) * stride +
               slot % CACHE_BLOCK * cached;
    }
};
template <class T>
DEVICE HalfOutput<T> half_output_of(const EpilogueArgs& e, uint32_t row) {
    if (e.mode != EPILOGUE_QKV) return HalfOutput<T>{static_cast<T*>(e.out) + row, e.width, 0};
    uint32_t head = row / (3 * e.head_size), part = row / e.head_size % 3, d = row % e.head_size;
    uint32_t width = e.heads * e.head_size;
    if (part == 0) return HalfOutput<T>{static_cast<T*>(e.out) + head * e.head_size + d, width, 0};
    T* cache = static_cast<T*>(part == 1 ? e.keys : e.values);
    return HalfOutput<T>{cache + head * CACHE_BLOCK * e.head_size + d, CACHE_BLOCK * width,
                         e.head_size};
}

// What the results of two neighbouring outputs need besides their sums. It does not depend on them,
// so that it can be loaded ahead of them.
struct PairInputs {
    float bias[2], residual[2];
    void* to; // where the first result is written
};

// For outputs `row` (which is even) and `row + 1` of a token. `second` is false if the second
// output does not exist.
template <class T>
DEVICE PairInputs load_pair_inputs(const EpilogueArgs& e, uint32_t token, uint32_t row,
                                   bool second) {
    PairInputs p = {};
    p.bias[0] = e.bias[row];
    if (second) p.bias[1] = e.bias[row + 1];
    if (half_output(e)) {
        p.to = half_output_at<T>(e, token, row);
        return p;
    }
    size_t at = static_cast<size_t>(token) * e.width + row;
    p.to = static_cast<float*>(e.out) + at;
    if (e.mode == EPILOGUE_RESIDUAL) {
        if (e.half_residual) {
            const T* r = static_cast<const T*>(e.residual) + at;
            p.residual[0] = to_float(r[0]);
            if (second) p.residual[1] = to_float(r[1]);
        } else {
            const float* r = static_cast<const float*>(e.residual) + at;
            p.residual[0] = r[0];
            if (second) p.residual[1] = r[1];
        }
    }
    return p;
}

// Finishes two neighbouring accumulators of a token.
template <class T>
DEVICE void finish_pair(const EpilogueArgs& e, const PairInputs& p, float a, float b, bool second) {
    a += p.bias[0];
    if (second) b += p.bias[1];
    if (e.mode == EPILOGUE_QKV) {
        *static_cast<uint32_t*>(p.to) = pack<T>(a, b);
        return;
    }
    if (half_output(e)) {
        T* out = static_cast<T*>(p.to);
        bool curved = e.mode == EPILOGUE_GELU;
        out[0] = to_half<T>(curved ? gelu(a) : a);
        if (second) out[1] = to_half<T>(curved ? gelu(b) : b);
        return;
    }
    if (e.mode == EPILOGUE_RESIDUAL) {
        a += p.residual[0];
        if (second) b += p.residual[1];
    }
    float* out = static_cast<float*>(p.to);
    out[0] = a;
    if (second) out[1] = b;
}

// Finishes two neighbouring accumulators of a token, those of outputs `row` (which is even) and
// `row + 1`. `second` is false if the second output does not exist.
template <class T>
DEVICE void epilogue_pair(const EpilogueArgs& e, uint32_t token, uint32_t row, float a, float b,
                          bool second) {
    finish_pair<T>(e, load_pair_inputs<T>(e, token, row, second), a, b, second);
}

// The same for eight neighbours from output `row` on, where the width is a multiple of 8.
template <class T>
DEVICE void epilogue_whole_eight(const EpilogueArgs& e, uint32_t token, uint32_t row,
                                 float (&v)[8]) {
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        Float4 bias = *reinterpret_cast<const Float4*>(e.bias + row + i);
        UNROLL
        for (int j = 0; j < 4; j++) v[i + j] += bias.v[j];
    }
    if (half_output(e)) {
        Pack16B out;
        UNROLL
        for (int i = 0; i < 8; i += 2) {
            out.pairs[i / 2] = e.mode == EPILOGUE_GELU ? pack<T>(gelu(v[i]), gelu(v[i + 1]))
                                                       : pack<T>(v[i], v[i + 1]);
        }
        *reinterpret_cast<Pack16B*>(half_output_at<T>(e, token, row)) = out;
        return;
    }
    size_t at = static_cast<size_t>(token) * e.width + row;
    if (e.mode == EPILOGUE_RESIDUAL && e.half_residual) {
        Pack16B r = *reinterpret_cast<const Pack16B*>(static_cast<const T*>(e.residual) + at);
        UNROLL
        for (int i = 0; i < 8; i += 2) {
            v[i] += low<T>(r.pairs[i / 2]);
            v[i + 1] += high<T>(r.pairs[i / 2]);
        }
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        Float4 out = {{v[i], v[i + 1], v[i + 2], v[i + 3]}};
        if (e.mode == EPILOGUE_RESIDUAL && !e.half_residual) {
            Float4 r =
                *reinterpret_cast<const Float4*>(static_cast<const float*>(e.residual) + at + i);
            UNROLL
            for (int j = 0; j < 4; j++) out.v[j] += r.v[j];
        }
        *reinterpret_cast<Float4*>(static_cast<float*>(e.out) + at + i) = out;
    }
}

// Finishes eight neighbouring accumulators of a token, from output `row` on, a multiple of 8. Not
// all of them need exist.
template <class T>
DEVICE void epilogue_eight(const EpilogueArgs& e, uint32_t token, uint32_t row, float (&v)[8]) {
    if (e.width % 8 == 0) {
        epilogue_whole_eight<T>(e, token, row, v);
        return;
    }
    UNROLL
    for (int j = 0; j < 8; j += 2) {
        if (row + j < e.width)
            epilogue_pair<T>(e, token, row + j, v[j], v[j + 1], row + j + 1 < e.width);
    }
}

// The same as PairInputs for four neighbouring outputs of a width that is a multiple of 8.
struct FourInputs {
    Float4 bias, residual;
    void* to;
};
template <class T>
DEVICE FourInputs load_four_inputs(const EpilogueArgs& e, uint32_t token, uint32_t row) {
    FourInputs p = {};
    p.bias = *reinterpret_cast<const Float4*>(e.bias + row);
    if (half_output(e)) {
        p.to = half_output_at<T>(e, token, row);
        return p;
    }
    size_t at = static_cast<size_t>(token) * e.width + row;
    p.to = static_cast<float*>(e.out) + at;
    if (e.mode == EPILOGUE_RESIDUAL) {
        if (e.half_residual) {
            const uint32_t* r =
                reinterpret_cast<const uint32_t*>(static_cast<const T*>(e.residual) + at);
            p.residual = Float4{{low<T>(r[0]), high<T>(r[0]), low<T>(r[1]), high<T>(r[1])}};
        } else {
            p.residual =
                *reinterpret_cast<const Float4*>(static_cast<const float*>(e.residual) + at);
        }
    }
    return p;
}

// Finishes four neighbouring accumulators of a token.
template <class T>
DEVICE void finish_four(const EpilogueArgs& e, const FourInputs& p, Float4 v) {
    UNROLL
    for (int j = 0; j < 4; j++) v.v[j] += p.bias.v[j];
    if (half_output(e)) {
        uint32_t* out = static_cast<uint32_t*>(p.to);
        UNROLL
        for (int j = 0; j < 4; j += 2) {
            out[j / 2] = e.mode == EPILOGUE_GELU ? pack<T>(gelu(v.v[j]), gelu(v.v[j + 1]))
                                                 : pack<T>(v.v[j], v.v[j + 1]);
        }
        return;
    }
    if (e.mode == EPILOGUE_RESIDUAL) {
        UNROLL
        for (int j = 0; j < 4; j++) v.v[j] += p.residual.v[j];
    }
    *static_cast<Float4*>(p.to) = v;
}
