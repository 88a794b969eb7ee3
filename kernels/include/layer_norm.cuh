// Layer norm of a row by one warp.
#pragma once
#include "memory.cuh"
#include "threads.cuh"

// Mean and 1 / std of `width` numbers, which `at(i)` returns four at a time, in two passes.
template <class At>
DEVICE void warp_mean_rstd(const At& at, int width, float eps, float& mean, float& rstd) {
    float sum = 0;
    for (int i = lane_index() * 4; i < width; i += WARP * 4) {
        Float4 v = at(i);
        sum += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]);
    }
    mean = warp_sum(sum) / static_cast<float>(width);
    float squares = 0;
    for (int i = lane_index() * 4; i < width; i += WARP * 4) {
        Float4 v = at(i);
        UNROLL
        for (int j = 0; j < 4; j++) squares += (v.v[j] - mean) * (v.v[j] - mean);
    }
    rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
}

// (v - mean) * rstd * weight + bias for the four numbers from `i` on.
DEVICE Float4 normalized(Float4 v, int i, const float* weight, const float* bias, float mean,
                         float rstd) {
    Float4 w = *reinterpret_cast<const Float4*>(weight + i),
           b = *reinterpret_cast<const Float4*>(bias + i);
    UNROLL
    for (int j = 0; j < 4; j++) v.v[j] = (v.v[j] - mean) * rstd * w.v[j] + b.v[j];
    return v;
}

// Calls `put(i, four)` with the normalized row, four numbers at a time. Rows of up to NORM_CACHED *
// 4 numbers in each lane stay in registers, so that they are read once; longer ones are read three
// times, mostly from caches. Both add in the same order.
constexpr int NORM_CACHED = 12;
template <class At, class Put>
DEVICE void normalize(const At& at, const float* weight, const float* bias, uint32_t width,
                      float eps, const Put& put) {
    uint32_t first = lane_index() * 4;
    float mean, rstd;
    if (width > NORM_CACHED * WARP * 4) {
        warp_mean_rstd(at, width, eps, mean, rstd);
        for (uint32_t i = first; i < width; i += WARP * 4)
            put(i, normalized(at(i), i, weight, bias, mean, rstd));
        return;
    }
    Float4 v[NORM_CACHED];
    UNROLL
    for (int j = 0; j < NORM_CACHED; j++) {
        v[j] = Float4{};
        if (first + j * WARP * 4 < width) v[j] = at(first + j * WARP * 4);
    }
    float sum = 0;
    UNROLL
    for (int j = 0; j < NORM_CACHED; j++) sum += (v[j].v[0] + v[j].v[1]) + (v[j].v[2] + v[j].v[3]);
    mean = warp_sum(sum) / static_cast<float>(width);
    float squares = 0;
    UNROLL
    for (int j = 0; j < NORM_CACHED; j++) {
        if (first + j * WARP * 4 >= width) continue;
        UNROLL
        for (int k = 0; k < 4; k++) squares += (v[j].v[k] - mean) * (v[j].v[k] - mean);
    }
    rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
    UNROLL
    for (int j = 0; j < NORM_CACHED; j++) {
        uint32_t i = first + j * WARP * 4;
        if (i < width) put(i, normalized(v[j], i, weight, bias, mean, rstd));
        // keeps the weights and biases of later iterations out of registers
        if (j % 4 == 3) compiler_fence();
    }
}

// A row of the residual stream in f32.
struct FloatRow {
    const float* x;
    DEVICE_MEMBER Float4 operator()(int i) const { return *reinterpret_cast<const Float4*>(x + i); }
};

template <class T>
DEVICE void store_four(T* to, Float4 v) {
    uint32_t* out = reinterpret_cast<uint32_t*>(to);
    out[0] = pack<T>(v.v[0], v.v[1]);
    out[1] = pack<T>(v.v[2], v.v[3]);
}

// Writes the normalized row in 16 bits.
template <class T>
DEVICE void normalize_row(T* out, const FloatRow& row, const float* weight, const float* bias,
                          uint32_t width, float eps) {
    normalize(row, weight, bias, width, eps, [&](uint32_t i, Float4 v) { store_four(out + i, v); });
}
