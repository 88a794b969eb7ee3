// The gradient's norm, and AdamW (Loshchilov and Hutter, arXiv 1711.05101) over flat parameters in
// one launch, with clipping and the refreshed 16-bit weights in the same pass.
//
// Limited by memory. Least bytes of AdamW: 30 a parameter (value, moments read and written;
// gradient read; 16-bit value written). Whether a step is taken at all, because loss and norm are
// numbers, is decided on the device: the host learns of it afterwards.
#include "block_sum.cuh"
#include "train_rows.cuh"

// partials[block] = sum of squares of the block's chunk of x.
KERNEL(squared_norm, TRAIN_THREADS)
(double* partials, const float* x, const OptimizerChunk* chunks) {
    griddep_launch_dependents();
    griddep_wait();
    OptimizerChunk chunk = chunks[blockIdx.x];
    float sums[4] = {};
    UNROLL
    for (uint32_t first = 0; first < OPTIMIZER_BLOCK; first += TRAIN_THREADS * 4) {
        uint32_t i = first + threadIdx.x * 4;
        if (i >= chunk.count) continue;
        Float4 v = take_four(x + chunk.first + i);
        UNROLL
        for (int j = 0; j < 4; j++) sums[j] += v.v[j] * v.v[j];
    }
    double sum = (static_cast<double>(sums[0]) + static_cast<double>(sums[1])) +
                 (static_cast<double>(sums[2]) + static_cast<double>(sums[3]));
    sum = block_sum<TRAIN_THREADS>(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}
EXPORT(squared_norm)

// Adds the sums of `blocks` blocks to the squared norm. One block.
KERNEL(sum_squares, TRAIN_THREADS)(TrainSums* sums, const double* partials, uint32_t blocks) {
    griddep_launch_dependents();
    griddep_wait();
    double sum = 0;
    for (uint32_t i = threadIdx.x; i < blocks; i += TRAIN_THREADS) sum += partials[i];
    sum = block_sum<TRAIN_THREADS>(sum);
    if (threadIdx.x == 0) sums->squared_norm += sum;
}
EXPORT(sum_squares)

// What clips the gradient's norm to `max`, and whether the step is taken. One thread: between the
// sums and this, they may be added up over several GPUs.
KERNEL(clip_gradients, 1)(TrainSums* sums, float max) {
    griddep_launch_dependents();
    griddep_wait();
    double norm = sqrt(sums->squared_norm), limit = static_cast<double>(max);
    sums->factor = norm > limit ? static_cast<float>(limit / (norm + 1e-6)) : 1.0f;
    // differences of numbers that are not finite are not zero
    sums->finite = norm - norm == 0 && sums->loss - sums->loss == 0;
}
EXPORT(clip_gradients)

KERNEL(adamw_bf16, TRAIN_THREADS)(AdamWArgs a) {
    griddep_launch_dependents();
    griddep_wait();
    if (!a.sums->finite) return;
    OptimizerChunk chunk = a.chunks[blockIdx.x];
    float factor = a.sums->factor, keep = chunk.decays ? a.keep : 1.0f;
    bf16* half_values = static_cast<bf16*>(a.half_values);
    for (uint32_t i = threadIdx.x * 4; i < chunk.count; i += TRAIN_THREADS * 4) {
        uint64_t at = chunk.first + i;
        Float4 g = take_four(a.grads + at), w = take_four(a.values + at);
        uint64_t moment = chunk.moments + i;
        Float4 m = take_four(a.first + moment), v = take_four(a.second + moment);
        UNROLL
        for (int j = 0; j < 4; j++) {
            float gradient = g.v[j] * factor;
            m.v[j] += (gradient - m.v[j]) * (1.0f - a.beta1);
            v.v[j] = v.v[j] * a.beta2 + gradient * gradient * (1.0f - a.beta2);
            float change = m.v[j] / (sqrtf(v.v[j]) / a.root + a.epsilon) * a.step_size;
            w.v[j] = w.v[j] * keep - change;
        }
        put_four(a.values + at, w);
        put_four(a.first + moment, m);
        put_four(a.second + moment, v);
        put_four(half_values + at, w);
    }
}
EXPORT(adamw_bf16)
