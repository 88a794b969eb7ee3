// y = epilogue(x W^T) for at most 64 tokens: reads the weights once, at the pace of memory.
//
//   x [tokens, inputs] in 16 bits, or the residual stream in f32 with a layer norm before the product
//   W [outputs, inputs] in 16 bits, or in 8 bits with a scale for each row
//
// Least bytes: the weights; FLOPs: 2 * tokens * inputs * outputs, hidden behind them up to 64 tokens by the tensor cores.
// A block takes 16 outputs, its 8 warps divide the inputs. Weights go from memory straight into the registers that
// the tensor cores read: a lane's 16 bytes are 8 (or 16) inputs of one row, and since a product does not mind a
// permutation of the inner dimension, they serve as the operands of two (four) instructions. The warps' sums are
// added in shared memory in a fixed order: a token's result depends on nothing but its own row.
// With a layer norm each block normalizes all tokens itself, into shared memory: one launch and one trip through
// memory less, for a few KB read from the second-level cache.
#include "epilogue.cuh"
#include "linear.cuh"
#include "tensor_core.cuh"

constexpr int WARPS = 8;
constexpr int OUTPUTS = 16;

// Sums of all tokens (16 * TILES) with this block's outputs, in shared memory as [token][OUTPUTS].
// Shared memory: WARPS * 16 * TILES * OUTPUTS floats, then the normalized rows if there is a norm.
template <class T, class W, int TILES>
DEVICE float* block_sums(const Input& in, const W* w, const float* scales, uint32_t outputs) {
    using Operand = Weights<T, W>;
    constexpr int STEPS = Operand::STEPS;
    constexpr int PER_LANE = 4 * STEPS; // inputs of a lane at a time
    float* sums = reinterpret_cast<float*>(shared_memory());
    const T* x = static_cast<const T*>(in.x);
    uint32_t stride = in.inputs;
    wait_for_earlier_kernels();
    if (in.weight) {
        T* rows = reinterpret_cast<T*>(sums + WARPS * 16 * TILES * OUTPUTS);
        stride = in.inputs + 8; // rows 16 bytes apart in the banks
        stage_normalized<T, WARPS>(in, rows, stride);
        x = rows;
    }
    int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
    const W* row[2];
    UNROLL
    for (int n = 0; n < 2; n++) {
        uint32_t r = blockIdx.x * OUTPUTS + n * 8 + g;
        row[n] = w + static_cast<size_t>(r < outputs ? r : outputs - 1) * in.inputs;
    }
    float c[TILES][2][4] = {};
    constexpr int UNROLLED = 2;
    for (uint32_t k0 = warp * 4 * PER_LANE; k0 < in.inputs; k0 += UNROLLED * WARPS * 4 * PER_LANE) {
        Eight weights[UNROLLED][2];
        UNROLL
        for (int u = 0; u < UNROLLED; u++) {
            uint32_t k = k0 + u * WARPS * 4 * PER_LANE + t * PER_LANE;
            UNROLL
            for (int n = 0; n < 2; n++) {
                weights[u][n] = Eight{};
                if (k < in.inputs) weights[u][n] = load_once(reinterpret_cast<const Eight*>(row[n] + k));
            }
        }
        UNROLL
        for (int u = 0; u < UNROLLED; u++) {
            uint32_t k = k0 + u * WARPS * 4 * PER_LANE + t * PER_LANE;
            UNROLL
            for (int m = 0; m < TILES; m++) {
                UNROLL
                for (int half = 0; half < STEPS / 2; half++) {
                    Eight a[2];
                    UNROLL
                    for (int i = 0; i < 2; i++) {
                        uint32_t token = m * 16 + i * 8 + g;
                        a[i] = Eight{};
                        if (token < in.tokens && k < in.inputs) {
                            a[i] = load(reinterpret_cast<const Eight*>(x + static_cast<size_t>(token) * stride + k + half * 8));
                        }
                    }
                    UNROLL
                    for (int s = 0; s < 2; s++) {
                        uint32_t av[4] = {a[0].pairs[2 * s], a[1].pairs[2 * s], a[0].pairs[2 * s + 1], a[1].pairs[2 * s + 1]};
                        UNROLL
                        for (int n = 0; n < 2; n++) {
                            uint32_t b[2];
                            Operand::operand(b, weights[u][n], half * 2 + s);
                            multiply<T>(c[m][n], av, b);
                        }
                    }
                }
            }
        }
    }
    let_next_kernel_begin();
    UNROLL
    for (int m = 0; m < TILES; m++) {
        UNROLL
        for (int n = 0; n < 2; n++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                int token = m * 16 + i / 2 * 8 + g;
                sums[(warp * 16 * TILES + token) * OUTPUTS + n * 8 + 2 * t + i % 2] = c[m][n][i];
            }
        }
    }
    sync_block();
    for (int i = threadIdx.x; i < 16 * TILES * OUTPUTS; i += WARPS * WARP) {
        float sum = 0;
        for (int other = 0; other < WARPS; other++) sum += sums[other * 16 * TILES * OUTPUTS + i];
        uint32_t r = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (scales && r < outputs) sum *= scales[r];
        sums[i] = sum; // nobody else reads or writes this place
    }
    sync_block();
    return sums;
}

template <class T, class W, int TILES>
DEVICE void linear_skinny(const Input& in, const W* w, const float* scales, const Epilogue& e) {
    float* sums = block_sums<T, W, TILES>(in, w, scales, e.width);
    for (uint32_t i = threadIdx.x * 2; i < in.tokens * OUTPUTS; i += WARPS * WARP * 2) {
        uint32_t token = i / OUTPUTS, row = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (row < e.width) finish_pair<T>(e, token, row, sums[i], sums[i + 1], row + 1 < e.width);
    }
}

#include "choice.cuh"

// Sums with the head's rows, as they are: `out` [tokens, outputs] in f32, and what is to know of each block's OUTPUTS of them:
// `moments` [tokens, blocks], if it is not null.
template <class T, class W, int TILES>
DEVICE void head_logits(const Input& in, const W* w, const float* scales, float* out, Moments* moments, uint32_t outputs) {
    float* sums = block_sums<T, W, TILES>(in, w, scales, outputs);
    for (uint32_t i = threadIdx.x; i < in.tokens * OUTPUTS; i += WARPS * WARP) {
        uint32_t token = i / OUTPUTS, row = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (row < outputs) out[static_cast<size_t>(token) * outputs + row] = sums[i];
    }
    if (!moments) return;
    static_assert(OUTPUTS == MOMENTS_OUTPUTS, "those of a block");
    for (uint32_t token = warp_index(); token < in.tokens; token += WARPS) {
        int lane = lane_index();
        bool here = lane < OUTPUTS && blockIdx.x * OUTPUTS + lane < outputs;
        float logit = here ? sums[token * OUTPUTS + lane] : -INFINITY;
        float most = warp_max(logit), sum = warp_sum(here ? expf(logit - most) : 0.0f);
        if (lane == 0) moments[static_cast<size_t>(token) * gridDim.x + blockIdx.x] = Moments{most, sum};
    }
}

#define SKINNY(T, W, suffix, TILES)                                                                                    \
    KERNEL(linear_skinny_##suffix##_##TILES, WARPS* WARP)                                                              \
    (Input in, const W* w, const float* scales, Epilogue e) { linear_skinny<T, W, TILES>(in, w, scales, e); }          \
    EXPORT(linear_skinny_##suffix##_##TILES)                                                                           \
    KERNEL_SHARED(head_logits_##suffix##_##TILES, WARPS* WARP, TILES == 1 ? 4 : 0)                                     \
    (Input in, const W* w, const float* scales, float* out, Moments* moments, uint32_t outputs) {                      \
        head_logits<T, W, TILES>(in, w, scales, out, moments, outputs);                                                \
    }                                                                                                                  \
    EXPORT(head_logits_##suffix##_##TILES)                                                                             \
    KERNEL_SHARED(head_choice_##suffix##_##TILES, WARPS* WARP, TILES == 1 ? 4 : 0)                                     \
    (Input in, const W* w, const float* scales, Choices choices, uint32_t outputs) {                                   \
        float* sums = block_sums<T, W, TILES>(in, w, scales, outputs);                                                 \
        choose_in_block<OUTPUTS>(sums, OUTPUTS, 0, in.tokens, blockIdx.x, choices, outputs);                           \
    }                                                                                                                  \
    EXPORT(head_choice_##suffix##_##TILES)
#define SKINNY_ALL(T, W, suffix)                                                                                       \
    SKINNY(T, W, suffix, 1)                                                                                            \
    SKINNY(T, W, suffix, 2)                                                                                            \
    SKINNY(T, W, suffix, 4)
SKINNY_ALL(bf16, bf16, bf16)
SKINNY_ALL(f16, f16, f16)
SKINNY_ALL(bf16, int8_t, bf16_int8)
SKINNY_ALL(f16, int8_t, f16_int8)
