// Layer norm for training: rows and their statistics, and the backward pass.
//
//   x, dx and the residual stream's gradient [tokens, width] in f32
//   y and dy [tokens, width] in 16 bits, or in f32 where they belong to the residual stream
//
// All are limited by memory. Least bytes of the backward pass: dy, x, the residual's gradient and
// dx once. A block takes NORM_BACKWARD_ROWS rows: first its warps take one row each and write dx,
// then its threads take columns and add these rows' shares of the gradients of weight and bias, for
// which rows come from the caches once more. The shares of all blocks are added by norm_gradients
// in the order of the blocks, so that sums depend on the shapes alone.
#include "layer_norm.cuh"
#include "train_rows.cuh"

template <class Out>
DEVICE void layer_norm_train(Out* y, float* mean_of, float* rstd_of, const float* x,
                             const float* weight, const float* bias, uint32_t tokens,
                             uint32_t width, float eps) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t token = blockIdx.x * NORM_ROWS + warp_index();
    if (token >= tokens) return;
    FloatRow row = {x + static_cast<size_t>(token) * width};
    float mean, rstd;
    warp_mean_rstd(row, width, eps, mean, rstd);
    if (lane_index() == 0) {
        mean_of[token] = mean;
        rstd_of[token] = rstd;
    }
    Out* out = y + static_cast<size_t>(token) * width;
    for (uint32_t i = lane_index() * 4; i < width; i += WARP * 4)
        put_four(out + i, normalized(row(i), i, weight, bias, mean, rstd));
}

// A row of the backward pass: four of its elements, the same normalized, and the gradients of
// these.
template <class T>
struct BackwardRow {
    const T* dy;
    const float* x;
    const float* weight;
    float mean, rstd;
    DEVICE_MEMBER BackwardRow(const NormBackwardArgs& a, uint32_t token)
        : dy(static_cast<const T*>(a.dy) + static_cast<size_t>(token) * a.width),
          x(a.x + static_cast<size_t>(token) * a.width), weight(a.weight), mean(a.mean[token]),
          rstd(a.rstd[token]) {}
    DEVICE_MEMBER Float4 normalized(uint32_t i) const {
        Float4 v = take_four(x + i);
        UNROLL
        for (int j = 0; j < 4; j++) v.v[j] = (v.v[j] - mean) * rstd;
        return v;
    }
    DEVICE_MEMBER Float4 gradient(uint32_t i) const {
        Float4 g = take_four(dy + i), w = take_four(weight + i);
        UNROLL
        for (int j = 0; j < 4; j++) g.v[j] *= w.v[j];
        return g;
    }
};

// dx = rstd * (g - mean(g) - normalized * mean(g * normalized)) + residual, by one warp.
template <class T>
DEVICE void input_gradient(const NormBackwardArgs& a, uint32_t token) {
    BackwardRow<T> row(a, token);
    float sum = 0, dot = 0;
    for (uint32_t i = lane_index() * 4; i < a.width; i += WARP * 4) {
        Float4 g = row.gradient(i), n = row.normalized(i);
        UNROLL
        for (int j = 0; j < 4; j++) {
            sum += g.v[j];
            dot += g.v[j] * n.v[j];
        }
    }
    sum = warp_sum(sum) / static_cast<float>(a.width);
    dot = warp_sum(dot) / static_cast<float>(a.width);
    size_t start = static_cast<size_t>(token) * a.width;
    for (uint32_t i = lane_index() * 4; i < a.width; i += WARP * 4) {
        Float4 g = row.gradient(i), n = row.normalized(i), r = {};
        if (a.residual) r = take_four(a.residual + start + i);
        UNROLL
        for (int j = 0; j < 4; j++) r.v[j] += row.rstd * (g.v[j] - sum - n.v[j] * dot);
        put_four(a.dx + start + i, r);
    }
}

template <class T>
DEVICE void layer_norm_backward(const NormBackwardArgs& a) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t first = blockIdx.x * NORM_BACKWARD_ROWS;
    uint32_t end = first + NORM_BACKWARD_ROWS < a.tokens ? first + NORM_BACKWARD_ROWS : a.tokens;
    for (uint32_t token = first + warp_index(); token < end; token += TRAIN_THREADS / WARP)
        input_gradient<T>(a, token);
    float* partials = a.partials + static_cast<size_t>(blockIdx.x) * 2 * a.width;
    for (uint32_t i = threadIdx.x * 4; i < a.width; i += TRAIN_THREADS * 4) {
        Float4 weight = {}, bias = {};
        for (uint32_t token = first; token < end; token++) {
            BackwardRow<T> row(a, token);
            Float4 g = take_four(row.dy + i), n = row.normalized(i);
            UNROLL
            for (int j = 0; j < 4; j++) {
                weight.v[j] += g.v[j] * n.v[j];
                bias.v[j] += g.v[j];
            }
        }
        put_four(partials + i, weight);
        put_four(partials + a.width + i, bias);
    }
}

#define LAYER_NORM_TRAIN(T, suffix)                                                           \
    KERNEL(layer_norm_train_##suffix, NORM_THREADS)                                           \
    (T * y, float* mean, float* rstd, const float* x, const float* weight, const float* bias, \
     uint32_t tokens, uint32_t width, float eps) {                                            \
        layer_norm_train<T>(y, mean, rstd, x, weight, bias, tokens, width, eps);              \
    }                                                                                         \
    EXPORT(layer_norm_train_##suffix)                                                         \
    KERNEL(layer_norm_backward_##suffix, TRAIN_THREADS)                                       \
    (NormBackwardArgs a) { layer_norm_backward<T>(a); }                                       \
    EXPORT(layer_norm_backward_##suffix)
LAYER_NORM_TRAIN(bf16, bf16)
LAYER_NORM_TRAIN(float, f32)

// Adds the shares of `blocks` blocks to the gradients of a norm's weight and bias. A warp takes one
// part of the blocks for 32 columns.
KERNEL(norm_gradients, TRAIN_THREADS)
(float* weight, float* bias, const float* partials, uint32_t blocks, uint32_t width) {
    constexpr uint32_t PARTS = TRAIN_THREADS / NORM_GRADIENT_COLUMNS;
    griddep_launch_dependents();
    griddep_wait();
    float* sums = reinterpret_cast<float*>(shared_memory()); // [part][column]
    uint32_t column = blockIdx.x * NORM_GRADIENT_COLUMNS + threadIdx.x % NORM_GRADIENT_COLUMNS;
    uint32_t part = threadIdx.x / NORM_GRADIENT_COLUMNS, each = (blocks + PARTS - 1) / PARTS;
    uint32_t end = (part + 1) * each < blocks ? (part + 1) * each : blocks;
    float sum = 0;
    if (column < 2 * width) {
        for (uint32_t b = part * each; b < end; b++)
            sum += partials[static_cast<size_t>(b) * 2 * width + column];
    }
    sums[threadIdx.x] = sum;
    block_sync();
    if (part > 0 || column >= 2 * width) return;
    for (uint32_t p = 1; p < PARTS; p++) sum += sums[p * NORM_GRADIENT_COLUMNS + threadIdx.x];
    *(column < width ? weight + column : bias + column - width) += sum;
}
EXPORT(norm_gradients)
