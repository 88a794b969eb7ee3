// Layer norm of a row by one warp, or by a block.
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

// A thread's columns of a norm's weight and bias, four out of WARPS * 128 neighbours, STEPS times.
// They do not depend on the rows, so that they can be loaded ahead of them.
template <int WARPS, int STEPS>
struct NormColumns {
    static constexpr uint32_t COLUMNS = WARPS * WARP * 4, MAX_WIDTH = STEPS * COLUMNS;
    Float4 weight[STEPS], bias[STEPS];

    DEVICE_MEMBER void load(const float* weights, const float* biases, uint32_t width) {
        UNROLL
        for (int j = 0; j < STEPS; j++) {
            uint32_t column = threadIdx.x * 4 + j * COLUMNS;
            weight[j] = bias[j] = Float4{};
            if (column >= width) continue;
            weight[j] = *reinterpret_cast<const Float4*>(weights + column);
            bias[j] = *reinterpret_cast<const Float4*>(biases + column);
        }
    }
};

// Normalizes `rows` rows of f32 by a block of WARPS warps, AT_ONCE rows at a time, where one warp
// for each row would wait longer for memory and for its own sums. Each warp finds the mean and the
// squares of its own columns, and these are merged in order (Chan et al. 1979), so that the block
// meets once. `row(i)` is where row `i` lies, and `put(i, column, four)` takes the results.
// `moments` is [WARPS][rows] times 16 bytes of shared memory.
template <int AT_ONCE, int WARPS, int STEPS, class Row, class Put>
DEVICE void normalize_together(const NormColumns<WARPS, STEPS>& norm, uint32_t rows, uint32_t width,
                               float eps, Float4* moments, const Row& row, const Put& put) {
    constexpr uint32_t COLUMNS = NormColumns<WARPS, STEPS>::COLUMNS;
    uint32_t warp = warp_index(), first = threadIdx.x * 4;
    uint32_t columns = 0; // of this warp
    UNROLL
    for (int j = 0; j < STEPS; j++) {
        uint32_t from = warp * WARP * 4 + j * COLUMNS;
        if (from < width) columns += width - from < WARP * 4 ? width - from : WARP * 4;
    }
    float count = static_cast<float>(columns), of_count = columns > 0 ? 1.0f / count : 0.0f,
          of_width = 1.0f / static_cast<float>(width);
    for (uint32_t above = 0; above < rows; above += AT_ONCE) {
        Float4 v[AT_ONCE][STEPS];
        UNROLL
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            if (above + i >= rows) continue;
            const float* from = row(above + i);
            UNROLL
            for (int j = 0; j < STEPS; j++) {
                v[i][j] = Float4{};
                if (first + j * COLUMNS < width)
                    v[i][j] = *reinterpret_cast<const Float4*>(from + first + j * COLUMNS);
            }
        }
        UNROLL
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            if (above + i >= rows) continue;
            float sum = 0, squares = 0;
            UNROLL
            for (int j = 0; j < STEPS; j++)
                sum += (v[i][j].v[0] + v[i][j].v[1]) + (v[i][j].v[2] + v[i][j].v[3]);
            float mean = warp_sum(sum) * of_count;
            UNROLL
            for (int j = 0; j < STEPS; j++) {
                if (first + j * COLUMNS >= width) continue;
                UNROLL
                for (int k = 0; k < 4; k++)
                    squares += (v[i][j].v[k] - mean) * (v[i][j].v[k] - mean);
            }
            squares = warp_sum(squares);
            if (lane_index() == 0)
                moments[warp * rows + above + i] = Float4{{count, mean, squares, 0}};
        }
        block_sync();
        UNROLL
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            if (above + i >= rows) continue;
            float sum = 0, squares = 0;
            UNROLL
            for (int w = 0; w < WARPS; w++) {
                Float4 of = moments[w * rows + above + i];
                sum += of.v[0] * of.v[1];
            }
            float mean = sum * of_width;
            UNROLL
            for (int w = 0; w < WARPS; w++) {
                Float4 of = moments[w * rows + above + i];
                squares += of.v[2] + of.v[0] * (of.v[1] - mean) * (of.v[1] - mean);
            }
            float rstd = 1.0f / sqrtf(squares * of_width + eps);
            UNROLL
            for (int j = 0; j < STEPS; j++) {
                if (first + j * COLUMNS >= width) continue;
                Float4 out;
                UNROLL
                for (int k = 0; k < 4; k++)
                    out.v[k] =
                        (v[i][j].v[k] - mean) * rstd * norm.weight[j].v[k] + norm.bias[j].v[k];
                put(above + i, first + j * COLUMNS, out);
            }
        }
    }
}
