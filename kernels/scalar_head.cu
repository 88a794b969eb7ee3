// Heads that give one number a row, such as a reward model's score or PPO's value, with their
// backward pass and their losses.
//
//   x [rows, width] in 16 bits; weight [width] and bias [1] in f32; y [rows] in f32
//
// All are limited by memory and small beside the trunk: x is read once forward and twice backward.
// Sums run in an order that depends on the shapes alone.
#include "block_sum.cuh"
#include "memory.cuh"
#include "train_rows.cuh"

// y = x weight + bias. A warp takes a row.
KERNEL(projection_bf16, TRAIN_THREADS)
(float* y, const bf16* x, const float* weight, const float* bias, uint32_t rows, uint32_t width) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t row = blockIdx.x * (TRAIN_THREADS / WARP) + warp_index();
    if (row >= rows) return;
    float sum = 0;
    for (uint32_t i = lane_index() * 4; i < width; i += WARP * 4) {
        Float4 a = take_four(x + static_cast<size_t>(row) * width + i), w = take_four(weight + i);
        UNROLL
        for (int j = 0; j < 4; j++) sum += a.v[j] * w.v[j];
    }
    UNROLL
    for (int mask = WARP / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() == 0) y[row] = bias ? sum + *bias : sum;
}
EXPORT(projection_bf16)

// dx = dy weight, but zero where x is no more than zero if x is the output of a ReLU. A warp takes
// a row.
KERNEL(projection_backward_bf16, TRAIN_THREADS)
(bf16* dx, const float* dy, const bf16* x, const float* weight, uint32_t rows, uint32_t width,
 uint32_t after_relu) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t row = blockIdx.x * (TRAIN_THREADS / WARP) + warp_index();
    if (row >= rows) return;
    float g = dy[row];
    size_t first = static_cast<size_t>(row) * width;
    for (uint32_t i = lane_index() * 4; i < width; i += WARP * 4) {
        Float4 a = take_four(x + first + i), w = take_four(weight + i);
        UNROLL
        for (int j = 0; j < 4; j++) a.v[j] = after_relu && a.v[j] <= 0 ? 0 : g * w.v[j];
        put_four(dx + first + i, a);
    }
}
EXPORT(projection_backward_bf16)

// weight_gradient += dy^T x, and bias_gradient += the sum of dy unless it is null. A block takes
// PROJECTION_COLUMNS columns, four a thread, and divides the rows among its threads.
KERNEL(projection_gradients_bf16, TRAIN_THREADS)
(float* weight_gradient, float* bias_gradient, const float* dy, const bf16* x, uint32_t rows,
 uint32_t width) {
    constexpr uint32_t ACROSS = PROJECTION_COLUMNS / 4, PARTS = TRAIN_THREADS / ACROSS;
    griddep_launch_dependents();
    griddep_wait();
    uint32_t column = blockIdx.x * PROJECTION_COLUMNS + threadIdx.x % ACROSS * 4;
    uint32_t part = threadIdx.x / ACROSS;
    Float4 sum = {};
    float sum_dy = 0;
    for (uint32_t row = part; row < rows; row += PARTS) {
        float g = dy[row];
        sum_dy += g;
        if (column >= width) continue;
        Float4 a = take_four(x + static_cast<size_t>(row) * width + column);
        UNROLL
        for (int j = 0; j < 4; j++) sum.v[j] += g * a.v[j];
    }
    Float4* sums = reinterpret_cast<Float4*>(shared_memory()); // [part][four columns]
    sums[threadIdx.x] = sum;
    block_sync();
    if (part == 0 && column < width) {
        for (uint32_t p = 1; p < PARTS; p++) {
            UNROLL
            for (int j = 0; j < 4; j++) sum.v[j] += sums[p * ACROSS + threadIdx.x].v[j];
        }
        Float4 before = take_four(weight_gradient + column);
        UNROLL
        for (int j = 0; j < 4; j++) before.v[j] += sum.v[j];
        put_four(weight_gradient + column, before);
    }
    if (bias_gradient == nullptr || blockIdx.x > 0) return;
    block_sync();
    // the threads of a part have all seen the same rows
    bool first = threadIdx.x % ACROSS == 0;
    double total = block_sum<TRAIN_THREADS>(first ? static_cast<double>(sum_dy) : 0.0);
    if (threadIdx.x == 0) *bias_gradient += static_cast<float>(total);
}
EXPORT(projection_gradients_bf16)

// The sum of (y - target)^2 is added to the step's; gradients go to dy unless it is null. One
// block, as for the losses below.
KERNEL(squared_loss, TRAIN_THREADS)
(TrainSums* sums, float* dy, const float* y, const float* targets, uint32_t rows, float scale) {
    griddep_launch_dependents();
    griddep_wait();
    double loss = 0;
    for (uint32_t i = threadIdx.x; i < rows; i += TRAIN_THREADS) {
        float error = y[i] - targets[i];
        loss += static_cast<double>(error * error);
        if (dy) dy[i] = 2 * scale * error;
    }
    loss = block_sum<TRAIN_THREADS>(loss);
    if (threadIdx.x == 0) sums->loss += loss;
}
EXPORT(squared_loss)

// Rows 2i are preferred to rows 2i + 1: -log sigmoid of the difference.
KERNEL(pairwise_loss, TRAIN_THREADS)
(TrainSums* sums, float* dy, const float* y, uint32_t rows, float scale) {
    griddep_launch_dependents();
    griddep_wait();
    double loss = 0;
    for (uint32_t i = threadIdx.x; 2 * i < rows; i += TRAIN_THREADS) {
        float margin = y[2 * i] - y[2 * i + 1];
        // log(1 + exp(-margin)), whose exponential never overflows
        float term = (margin < 0 ? -margin : 0.0f) + log1pf(expf(-fabsf(margin)));
        // a margin that is no number makes the loss none, so that the step is not taken
        loss += static_cast<double>(term);
        float gradient = -scale / (1 + expf(margin));
        if (dy) {
            dy[2 * i] = gradient;
            dy[2 * i + 1] = -gradient;
        }
    }
    loss = block_sum<TRAIN_THREADS>(loss);
    if (threadIdx.x == 0) sums->loss += loss;
}
EXPORT(pairwise_loss)

// PPO's loss of values, which have no influence beyond `clip` of what they were.
KERNEL(clipped_value_loss, TRAIN_THREADS)(ClippedValueArgs a) {
    griddep_launch_dependents();
    griddep_wait();
    double loss = 0;
    for (uint32_t i = threadIdx.x; i < a.rows; i += TRAIN_THREADS) {
        float y = a.y[i], low = a.old_values[i] - a.clip, high = a.old_values[i] + a.clip;
        float error = y - a.returns[i];
        float clipped = fminf(fmaxf(y, low), high) - a.returns[i];
        // a value that is no number makes the loss none, so that the step is not taken
        bool is_clipped = clipped * clipped > error * error;
        float of = is_clipped ? clipped : error;
        loss += static_cast<double>(0.5f * a.coefficient * of * of);
        if (a.dy) a.dy[i] = is_clipped ? 0.0f : a.scale * a.coefficient * error;
    }
    loss = block_sum<TRAIN_THREADS>(loss);
    if (threadIdx.x == 0) a.sums->loss += loss;
}
EXPORT(clipped_value_loss)
