// What a GEMM does with its accumulators: bias, activation, residual, and where results are
// written.
#pragma once
#include "numbers.cuh"

DEVICE float gelu(float x) {
    float u = 0.79788456f * x * (1.0f + 0.044715f * x * x);
    return divide_approx(x, 1.0f + exp_approx(-2.0f * u));
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

// Finishes two neighbouring accumulators of a token, those of outputs `row` (which is even) and
// `row + 1`. `second` is false if the second output does not exist.
template <class T>
DEVICE void epilogue_pair(const EpilogueArgs& e, uint32_t token, uint32_t row, float a, float b,
                          bool second) {
    a += e.bias[row];
    if (second) b += e.bias[row + 1];
    if (e.mode == EPILOGUE_QKV) {
        *reinterpret_cast<uint32_t*>(half_output_at<T>(e, token, row)) = pack<T>(a, b);
        return;
    }
    if (half_output(e)) {
        T* out = half_output_at<T>(e, token, row);
        bool curved = e.mode == EPILOGUE_GELU;
        out[0] = to_half<T>(curved ? gelu(a) : a);
        if (second) out[1] = to_half<T>(curved ? gelu(b) : b);
        return;
    }
    size_t at = static_cast<size_t>(token) * e.width + row;
    if (e.mode == EPILOGUE_RESIDUAL) {
        if (e.half_residual) {
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
