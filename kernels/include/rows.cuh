// Layer norm of a row.
#pragma once
#include "memory.cuh"
#include "threads.cuh"

// Mean and 1 / deviation of `width` numbers that `at(i)` gives by fours, computed by one warp in
// two passes.
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
DEVICE Four normalized(Four v, int i, const float* weight, const float* bias, float mean,
                       float inverse) {
    Four w = *reinterpret_cast<const Four*>(weight + i),
         b = *reinterpret_cast<const Four*>(bias + i);
    UNROLL
    for (int j = 0; j < 4; j++) v.v[j] = (v.v[j] - mean) * inverse * w.v[j] + b.v[j];
    return v;
}

// Gives `put(i, four)` the normalized row by fours, by one warp. Rows of up to NORM_CACHED fours a
// lane stay in registers: one trip to memory, where there would be three to the caches. The sums
// are those of `warp_moments`.
constexpr int NORM_CACHED = 12;
template <class At, class Put>
DEVICE void normalize(const At& at, const float* weight, const float* bias, uint32_t width,
                      float eps, const Put& put) {
    uint32_t first = lane_index() * 4;
    float mean, inverse;
    if (width > NORM_CACHED * WARP * 4) {
        warp_moments(at, width, eps, mean, inverse);
        for (uint32_t i = first; i < width; i += WARP * 4)
            put(i, normalized(at(i), i, weight, bias, mean, inverse));
        return;
    }
    Four v[NORM_CACHED];
    UNROLL
    for (int j = 0; j < NORM_CACHED; j++) {
        v[j] = Four{};
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
    inverse = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
    UNROLL
    for (int j = 0; j < NORM_CACHED; j++) {
        uint32_t i = first + j * WARP * 4;
        if (i < width) put(i, normalized(v[j], i, weight, bias, mean, inverse));
        if (j % 4 == 3)
            keep_order(); // not all of the gain and shift at once: there are no registers for it
    }
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
DEVICE void normalize_row(T* out, const FloatRow& row, const float* weight, const float* bias,
                          uint32_t width, float eps) {
    normalize(row, weight, bias, width, eps, [&](uint32_t i, Four v) { store_four(out + i, v); });
}
