// y = epilogue(x W^T) for at most 64 tokens, at the speed at which memory delivers the weights;
// also the LM head for as many rows.
//
//   x [tokens, inputs] in 16 bits, or the residual stream in f32 with a layer norm before it
//   W [outputs, inputs] in 16 bits, or in 8 bits with a scale for each row
//
// Least bytes: the weights, once. FLOPs: 2 * tokens * inputs * outputs, which the tensor cores hide
// behind the weights up to 64 tokens.
// A block takes 16 outputs, and its 8 warps divide the inputs. Every warp keeps several rounds of
// weights in flight to a ring in shared memory with cp.async, which the compiler cannot delay as it
// does loads into registers. It starts the first of them before griddep_wait, since weights do not
// depend on the previous kernel; at the widths of the model these are all weights of the block. A
// lane reads back only what it copied itself, so there is no barrier. Its 16 bytes are 8 (or 16)
// inputs of one row; since the inner dimension may be permuted, they are the operands of two (or
// four) instructions as they are. The sums of the warps are added in shared memory in a fixed
// order: the result of a token depends on its own row alone.
// With a layer norm, each block normalizes all tokens itself into shared memory: that saves one
// launch and one pass through memory, for a few KB from L2. A few rows without a norm are copied to
// shared memory too.
#include "epilogue.cuh"
#include "linear.cuh"
#include "mma.cuh"
#include "sampling.cuh"

constexpr int WARPS = SKINNY_WARPS;
constexpr int OUTPUTS = SKINNY_OUTPUTS;

constexpr int SHALLOW = SKINNY_SHALLOW, DEEP = SKINNY_DEEP;
constexpr int ROUND_BYTES = 2 * 16 * WARP; // of a warp: 16 bytes of two rows in each lane

// Copies the rows of `in` to rows of `stride` elements in shared memory.
template <class T>
DEVICE void stage_rows(const LinearArgs& in, T* rows, uint32_t stride) {
    const T* x = static_cast<const T*>(in.x);
    uint32_t chunks = in.inputs / 8;
    constexpr int AT_ONCE = 4;
    for (uint32_t first = threadIdx.x; first < in.tokens * chunks;
         first += AT_ONCE * WARPS * WARP) {
        Pack16B v[AT_ONCE];
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) {
            uint32_t i = first + j * WARPS * WARP;
            v[j] = Pack16B{};
            if (i < in.tokens * chunks) v[j] = load(reinterpret_cast<const Pack16B*>(x) + i);
        }
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) {
            uint32_t i = first + j * WARPS * WARP;
            if (i < in.tokens * chunks)
                *reinterpret_cast<Pack16B*>(rows + i / chunks * stride + i % chunks * 8) = v[j];
        }
    }
    block_sync();
}

// Computes x W^T for all tokens (up to 16 * TILES) and the outputs of this block, and leaves it in
// shared memory as [token][OUTPUTS].
// Shared memory holds the rings of the warps, each of which the sums of the warp take over; then
// weight and bias of the norm if there is one; then the rows if they are normalized or staged.
template <class T, class W, int TILES, bool NORMS = false, int DEPTH = SHALLOW>
DEVICE float* accumulate_block(const LinearArgs& in, const W* w, const float* scales,
                               uint32_t outputs) {
    using Operand = Weights<T, W>;
    constexpr int STEPS = Operand::STEPS;
    constexpr int PER_LANE = 4 * STEPS; // inputs of each lane in a round
    constexpr int ROUND = WARPS * 4 * PER_LANE;
    constexpr int RING_BYTES = DEPTH * ROUND_BYTES, RING_FLOATS = RING_BYTES / 4;
    static_assert(16 * TILES * OUTPUTS * 4 <= RING_BYTES, "room for the sums of a warp");
    // blocks of the next kernel may load their weights where there is room
    griddep_launch_dependents();
    if (scales && threadIdx.x == 0) prefetch_l2(scales + blockIdx.x * OUTPUTS, 4, 0, 1);
    char* shared = shared_memory();
    int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    char* ring = shared + warp * RING_BYTES + lane * 16;
    uint32_t rounds = (in.inputs + ROUND - 1) / ROUND, first_input = (warp * 4 + t) * PER_LANE;
    const W* row[2];
    UNROLL
    for (int n = 0; n < 2; n++) {
        uint32_t r = blockIdx.x * OUTPUTS + n * 8 + g;
        row[n] = w + static_cast<size_t>(r < outputs ? r : outputs - 1) * in.inputs + first_input;
    }
    auto issue = [&](uint32_t round, uint32_t slot) {
        if (round < rounds) {
            bool valid = round * ROUND + first_input < in.inputs;
            UNROLL
            for (int n = 0; n < 2; n++) {
                cp_async(ring + (slot * 2 + n) * 16 * WARP, valid ? row[n] + round * ROUND : w,
                         valid);
            }
        }
        cp_async_commit_group();
    };
    // weight and bias of the norm come first, because they are in memory and not in L2, as the
    // weights are
    bool norms = NORMS && in.weight;
    float* parameters = reinterpret_cast<float*>(shared + WARPS * RING_BYTES);
    if constexpr (NORMS) {
        for (uint32_t i = threadIdx.x * 4; norms && i < in.inputs; i += WARPS * WARP * 4) {
            cp_async(parameters + i, in.weight + i, true);
            cp_async(parameters + in.inputs + i, in.bias + i, true);
        }
        cp_async_commit_group();
    }
    UNROLL
    for (int r = 0; r < DEPTH; r++) issue(r, r);
    griddep_wait();
    const T* x = static_cast<const T*>(in.x);
    uint32_t stride = in.inputs;
    if (norms || in.staged) {
        T* rows = reinterpret_cast<T*>(parameters + (norms ? 2 * in.inputs : 0));
        // the padding avoids bank conflicts
        stride = in.inputs + (sizeof(W) == 1 ? 8 : 32);
        if constexpr (NORMS) {
            if (norms) {
                cp_async_wait_group<DEPTH>();
                block_sync();
                LinearArgs staged = in;
                staged.weight = parameters;
                staged.bias = parameters + in.inputs;
                stage_normalized<T, WARPS>(staged, rows, stride);
            }
        }
        if (!norms) stage_rows(in, rows, stride);
        x = rows;
    }
    constexpr int HALVES = STEPS / 2;
    using Activations = Pack16B[HALVES][2];
    auto activations = [&](uint32_t round, int m, Activations& a) {
        uint32_t k = round * ROUND + first_input;
        UNROLL
        for (int half = 0; half < HALVES; half++) {
            UNROLL
            for (int i = 0; i < 2; i++) {
                uint32_t token = m * 16 + i * 8 + g;
                a[half][i] = Pack16B{};
                if (token < in.tokens && k < in.inputs) {
                    a[half][i] = load(reinterpret_cast<const Pack16B*>(
                        x + static_cast<size_t>(token) * stride + k + half * 8));
                }
            }
        }
    };
    float c[TILES][2][4] = {};
    // with one tile there are registers for the next round's activations
    constexpr bool AHEAD = TILES == 1;
    Activations a, next;
    if constexpr (AHEAD) activations(0, 0, next);
    for (uint32_t round = 0, slot = 0; round < rounds; round++) {
        if constexpr (AHEAD) {
            UNROLL
            for (int half = 0; half < HALVES; half++) {
                a[half][0] = next[half][0];
                a[half][1] = next[half][1];
            }
            activations(round + 1, 0, next);
        }
        cp_async_wait_group<DEPTH - 1>();
        Pack16B weights[2];
        UNROLL
        for (int n = 0; n < 2; n++)
            weights[n] = load(reinterpret_cast<const Pack16B*>(ring + (slot * 2 + n) * 16 * WARP));
        UNROLL
        for (int m = 0; m < TILES; m++) {
            if constexpr (!AHEAD) activations(round, m, a);
            UNROLL
            for (int half = 0; half < HALVES; half++) {
                UNROLL
                for (int s = 0; s < 2; s++) {
                    const Pack16B &upper = a[half][0], &lower = a[half][1];
                    uint32_t av[4] = {upper.pairs[2 * s], lower.pairs[2 * s],
                                      upper.pairs[2 * s + 1], lower.pairs[2 * s + 1]};
                    UNROLL
                    for (int n = 0; n < 2; n++) {
                        uint32_t b[2];
                        Operand::operand(b, weights[n], half * 2 + s);
                        mma_m16n8k16<T>(c[m][n], av, b);
                    }
                }
            }
        }
        issue(round + DEPTH, slot); // the operands are in registers by now
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    float* sums = reinterpret_cast<float*>(shared);
    warp_sync(); // all lanes have read the ring of the warp
    UNROLL
    for (int m = 0; m < TILES; m++) {
        UNROLL
        for (int n = 0; n < 2; n++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                int token = m * 16 + i / 2 * 8 + g;
                sums[warp * RING_FLOATS + token * OUTPUTS + n * 8 + 2 * t + i % 2] = c[m][n][i];
            }
        }
    }
    block_sync();
    for (int i = threadIdx.x; i < 16 * TILES * OUTPUTS; i += WARPS * WARP) {
        float sum = 0;
        for (int other = 0; other < WARPS; other++) sum += sums[other * RING_FLOATS + i];
        uint32_t r = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (scales && r < outputs) sum *= scales[r];
        sums[i] = sum; // no other thread reads or writes this element
    }
    block_sync();
    return sums;
}

template <class T, class W, int TILES, int DEPTH = SHALLOW>
DEVICE void linear_skinny(const LinearArgs& in, const W* w, const float* scales,
                          const EpilogueArgs& e) {
    if (threadIdx.x == 0) prefetch_l2(e.bias + blockIdx.x * OUTPUTS, 4, 0, 1);
    float* sums = accumulate_block<T, W, TILES, true, DEPTH>(in, w, scales, e.width);
    for (uint32_t i = threadIdx.x * 2; i < in.tokens * OUTPUTS; i += WARPS * WARP * 2) {
        uint32_t token = i / OUTPUTS, row = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (row < e.width) epilogue_pair<T>(e, token, row, sums[i], sums[i + 1], row + 1 < e.width);
    }
}

// Writes logits, `out` [tokens, outputs] in f32, and unless `stats` is null the softmax statistics
// of each block's OUTPUTS of them, `stats` [tokens, blocks].
template <class T, class W, int TILES>
DEVICE void lm_head_logits(const LinearArgs& in, const W* w, const float* scales, float* out,
                           SoftmaxStats* stats, uint32_t outputs) {
    float* sums = accumulate_block<T, W, TILES>(in, w, scales, outputs);
    for (uint32_t i = threadIdx.x; i < in.tokens * OUTPUTS; i += WARPS * WARP) {
        uint32_t token = i / OUTPUTS, row = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (row < outputs) out[static_cast<size_t>(token) * outputs + row] = sums[i];
    }
    if (!stats) return;
    static_assert(OUTPUTS == STATS_OUTPUTS, "a block has one group of outputs");
    for (uint32_t token = warp_index(); token < in.tokens; token += WARPS) {
        int lane = lane_index();
        bool here = lane < OUTPUTS && blockIdx.x * OUTPUTS + lane < outputs;
        float logit = here ? sums[token * OUTPUTS + lane] : -INFINITY;
        float max = warp_max(logit), sum_exp = warp_sum(here ? expf(logit - max) : 0.0f);
        if (lane == 0)
            stats[static_cast<size_t>(token) * gridDim.x + blockIdx.x] = SoftmaxStats{max, sum_exp};
    }
}

#define SKINNY(T, W, suffix, TILES)                                                            \
    KERNEL_SHARED(linear_skinny_##suffix##_##TILES, WARPS* WARP, TILES == 1 ? 3 : 1)           \
    (LinearArgs in, const W* w, const float* scales, EpilogueArgs e) {                         \
        linear_skinny<T, W, TILES>(in, w, scales, e);                                          \
    }                                                                                          \
    EXPORT(linear_skinny_##suffix##_##TILES)                                                   \
    KERNEL_SHARED(lm_head_logits_##suffix##_##TILES, WARPS* WARP, TILES == 1 ? 4 : 0)          \
    (LinearArgs in, const W* w, const float* scales, float* out, SoftmaxStats* stats,          \
     uint32_t outputs) {                                                                       \
        lm_head_logits<T, W, TILES>(in, w, scales, out, stats, outputs);                       \
    }                                                                                          \
    EXPORT(lm_head_logits_##suffix##_##TILES)                                                  \
    KERNEL_SHARED(lm_head_sample_##suffix##_##TILES, WARPS* WARP, TILES == 1 ? 4 : 0)          \
    (LinearArgs in, const W* w, const float* scales, SamplingArgs choices, uint32_t outputs) { \
        float* sums = accumulate_block<T, W, TILES>(in, w, scales, outputs);                   \
        sample_in_block<OUTPUTS>(sums, OUTPUTS, 0, in.tokens, blockIdx.x, choices, outputs);   \
    }                                                                                          \
    EXPORT(lm_head_sample_##suffix##_##TILES)
#define SKINNY_DEEP(T, W, suffix)                                      \
    KERNEL_SHARED(linear_skinny_##suffix##_1_deep, WARPS* WARP, 1)     \
    (LinearArgs in, const W* w, const float* scales, EpilogueArgs e) { \
        linear_skinny<T, W, 1, DEEP>(in, w, scales, e);                \
    }                                                                  \
    EXPORT(linear_skinny_##suffix##_1_deep)
#define SKINNY_ALL(T, W, suffix) \
    SKINNY_DEEP(T, W, suffix)    \
    SKINNY(T, W, suffix, 1)      \
    SKINNY(T, W, suffix, 2)      \
    SKINNY(T, W, suffix, 4)
SKINNY_ALL(bf16, bf16, bf16)
SKINNY_ALL(f16, f16, f16)
SKINNY_ALL(bf16, int8_t, bf16_int8)
SKINNY_ALL(f16, int8_t, f16_int8)
