// Layer norm of a row.
#pragma once
#include "memory.cuh"
#include "threads.cuh"

// Mean and 1 / deviation of `width` numbers that `at(i)` gives by fours, computed by one warp in two passes.
template <class At>
DEVICE void warp_moments(const At& at, int width, float eps, float& mean, float& inverse) {
    float sum = 0;
    for (int i = lane_index() * 4; i < width; i += WARP * 4) {
        Four v = at(i);
        sum += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]);
    }
    mean = warp_sum(sum) / static_cast<float>(width);
    float squares = 0;
    for (int i = lane_index() * 4; i < width; i += WARP * 4) {
        Four v = at(i);
        UNROLL
        for (int j = 0; j < 4; j++) squares += (v.v[j] - mean) * (v.v[j] - mean);
    }
    inverse = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
}

// (v - mean) * inverse * weight + bias for the four numbers from `i` on.
DEVICE Four normalized(Four v, int i, const float* weight, const float* bias, float mean, float inverse) {
    Four w = *reinterpret_cast<const Four*>(weight + i), b = *reinterpret_cast<const Four*>(bias + i);
    UNROLL
    for (int j = 0; j < 4; j++) v.v[j] = (v.v[j] - mean) * inverse * w.v[j] + b.v[j];
    return v;
}

// The residual stream's row in f32.
struct FloatRow {
    const float* x;
    DEVICE_MEMBER Four operator()(int i) const { return *reinterpret_cast<const Four*>(x + i); }
};

template <class T>
DEVICE void store_four(T* to, Four v) {
    uint32_t* out = reinterpret_cast<uint32_t*>(to);
    out[0] = pack<T>(v.v[0], v.v[1]);
    out[1] = pack<T>(v.v[2], v.v[3]);
}

// The normalized row in 16 bits, by one warp.
template <class T>
DEVICE void normalize_row(T* out, const FloatRow& row, const float* weight, const float* bias, uint32_t width, float eps) {
    float mean, inverse;
    warp_moments(row, width, eps, mean, inverse);
    for (uint32_t i = lane_index() * 4; i < width; i += WARP * 4) {
        store_four(out + i, normalized(row(i), i, weight, bias, mean, inverse));
    }
}
