// y = epilogue(x W^T) for at most 64 tokens: reads the weights once, at the pace of memory.
//
//   x [tokens, inputs] in 16 bits, or the residual stream in f32 with a layer norm before it
//   W [outputs, inputs] in 16 bits, or in 8 bits with a scale for each row
//
// Least bytes: the weights; FLOPs: 2 * tokens * inputs * outputs, hidden behind them up to 64
// tokens by the tensor cores. A block takes 16 outputs, its 8 warps divide the inputs. Every warp
// keeps several rounds of weights on their way into a ring in shared memory (cp.async), which the
// compiler cannot put off as it does loads into registers, and asks for the first of them before
// the kernel waits for those it follows: weights do not depend on them. At the model's widths that
// is all of a block's weights. A lane reads back what it asked for itself, so nobody waits for
// anybody: 16 bytes are 8 (or 16) inputs of one row, and since a product does not mind a
// permutation of the inner dimension, they serve as the operands of two (four) instructions. The
// warps' sums are added in shared memory in a fixed order: a token's result depends on nothing but
// its own row. With a layer norm each block normalizes all tokens itself, into shared memory: one
// launch and one trip through memory less, for a few KB read from the second-level cache. Few rows
// without a norm are brought to shared memory too, in one trip.
#include "epilogue.cuh"
#include "linear.cuh"
#include "tensor_core.cuh"

constexpr int WARPS = 8;
constexpr int OUTPUTS = 16;

// Rounds of weights on their way: where blocks share a multiprocessor, and where they do not.
constexpr int SHALLOW = 6, DEEP = 12;
constexpr int ROUND_BYTES = 2 * 16 * WARP; // of a warp: 16 bytes of two rows for each lane

// Brings `in`'s rows to shared rows of `stride` elements.
template <class T>
DEVICE void stage_rows(const Input& in, T* rows, uint32_t stride) {
    const T* x = static_cast<const T*>(in.x);
    uint32_t pieces = in.inputs / 8;
    constexpr int AT_ONCE = 4;
    for (uint32_t first = threadIdx.x; first < in.tokens * pieces;
         first += AT_ONCE * WARPS * WARP) {
        Eight v[AT_ONCE];
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) {
            uint32_t i = first + j * WARPS * WARP;
            v[j] = Eight{};
            if (i < in.tokens * pieces) v[j] = load(reinterpret_cast<const Eight*>(x) + i);
        }
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) {
            uint32_t i = first + j * WARPS * WARP;
            if (i < in.tokens * pieces)
                *reinterpret_cast<Eight*>(rows + i / pieces * stride + i % pieces * 8) = v[j];
        }
    }
    sync_block();
}

// Sums of all tokens (16 * TILES) with this block's outputs, in shared memory as [token][OUTPUTS].
// Shared memory: the warps' rings, each of which a warp's sums take over; then gain and shift if
// there is a norm; then rows, if they are normalized or staged.
template <class T, class W, int TILES, bool NORMS = false, int DEPTH = SHALLOW>
DEVICE float* block_sums(const Input& in, const W* w, const float* scales, uint32_t outputs) {
    using Operand = Weights<T, W>;
    constexpr int STEPS = Operand::STEPS;
    constexpr int PER_LANE = 4 * STEPS; // inputs of a lane in a round
    constexpr int ROUND = WARPS * 4 * PER_LANE;
    constexpr int RING_BYTES = DEPTH * ROUND_BYTES, RING_FLOATS = RING_BYTES / 4;
    static_assert(16 * TILES * OUTPUTS * 4 <= RING_BYTES, "room for a warp's sums");
    let_next_kernel_begin(); // its blocks may ask for their weights where this kernel's leave room
    if (scales && threadIdx.x == 0) prefetch(scales + blockIdx.x * OUTPUTS, 4, 0, 1);
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
    auto ask = [&](uint32_t round, uint32_t place) {
        if (round < rounds) {
            bool valid = round * ROUND + first_input < in.inputs;
            UNROLL
            for (int n = 0; n < 2; n++) {
                copy_async(ring + (place * 2 + n) * 16 * WARP, valid ? row[n] + round * ROUND : w,
                           valid);
            }
        }
        copy_commit();
    };
    // the norm's gain and shift come first: memory has them, as the weights, and no cache
    bool norms = NORMS && in.weight;
    float* parameters = reinterpret_cast<float*>(shared + WARPS * RING_BYTES);
    if constexpr (NORMS) {
        for (uint32_t i = threadIdx.x * 4; norms && i < in.inputs; i += WARPS * WARP * 4) {
            copy_async(parameters + i, in.weight + i, true);
            copy_async(parameters + in.inputs + i, in.bias + i, true);
        }
        copy_commit();
    }
    UNROLL
    for (int r = 0; r < DEPTH; r++) ask(r, r);
    wait_for_earlier_kernels();
    const T* x = static_cast<const T*>(in.x);
    uint32_t stride = in.inputs;
    if (norms || in.staged) {
        T* rows = reinterpret_cast<T*>(parameters + (norms ? 2 * in.inputs : 0));
        // lanes that read together meet no bank twice
        stride = in.inputs + (sizeof(W) == 1 ? 8 : 32);
        if constexpr (NORMS) {
            if (norms) {
                copy_wait<DEPTH>();
                sync_block();
                Input staged = in;
                staged.weight = parameters;
                staged.bias = parameters + in.inputs;
                stage_normalized<T, WARPS>(staged, rows, stride);
            }
        }
        if (!norms) stage_rows(in, rows, stride);
        x = rows;
    }
    constexpr int HALVES = STEPS / 2;
    using Activations = Eight[HALVES][2];
    auto activations = [&](uint32_t round, int m, Activations& a) {
        uint32_t k = round * ROUND + first_input;
        UNROLL
        for (int half = 0; half < HALVES; half++) {
            UNROLL
            for (int i = 0; i < 2; i++) {
                uint32_t token = m * 16 + i * 8 + g;
                a[half][i] = Eight{};
                if (token < in.tokens && k < in.inputs) {
                    a[half][i] = load(reinterpret_cast<const Eight*>(
                        x + static_cast<size_t>(token) * stride + k + half * 8));
                }
            }
        }
    };
    float c[TILES][2][4] = {};
    constexpr bool AHEAD = TILES == 1; // where there are registers for the next round's activations
    Activations a, next;
    if constexpr (AHEAD) activations(0, 0, next);
    for (uint32_t round = 0, place = 0; round < rounds; round++) {
        if constexpr (AHEAD) {
            UNROLL
            for (int half = 0; half < HALVES; half++) {
                a[half][0] = next[half][0];
                a[half][1] = next[half][1];
            }
            activations(round + 1, 0, next);
        }
        copy_wait<DEPTH - 1>();
        Eight weights[2];
        UNROLL
        for (int n = 0; n < 2; n++)
            weights[n] = load(reinterpret_cast<const Eight*>(ring + (place * 2 + n) * 16 * WARP));
        UNROLL
        for (int m = 0; m < TILES; m++) {
            if constexpr (!AHEAD) activations(round, m, a);
            UNROLL
            for (int half = 0; half < HALVES; half++) {
                UNROLL
                for (int s = 0; s < 2; s++) {
                    const Eight &upper = a[half][0], &lower = a[half][1];
                    uint32_t av[4] = {upper.pairs[2 * s], lower.pairs[2 * s],
                                      upper.pairs[2 * s + 1], lower.pairs[2 * s + 1]};
                    UNROLL
                    for (int n = 0; n < 2; n++) {
                        uint32_t b[2];
                        Operand::operand(b, weights[n], half * 2 + s);
                        multiply<T>(c[m][n], av, b);
                    }
                }
            }
        }
        ask(round + DEPTH, place); // the products have what was there
        place = place + 1 == DEPTH ? 0 : place + 1;
    }
    float* sums = reinterpret_cast<float*>(shared);
    sync_warp(); // all lanes have read the warp's ring
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
    sync_block();
    for (int i = threadIdx.x; i < 16 * TILES * OUTPUTS; i += WARPS * WARP) {
        float sum = 0;
        for (int other = 0; other < WARPS; other++) sum += sums[other * RING_FLOATS + i];
        uint32_t r = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (scales && r < outputs) sum *= scales[r];
        sums[i] = sum; // nobody else reads or writes this place
    }
    sync_block();
    return sums;
}

template <class T, class W, int TILES, int DEPTH = SHALLOW>
DEVICE void linear_skinny(const Input& in, const W* w, const float* scales, const Epilogue& e) {
    if (threadIdx.x == 0) prefetch(e.bias + blockIdx.x * OUTPUTS, 4, 0, 1);
    float* sums = block_sums<T, W, TILES, true, DEPTH>(in, w, scales, e.width);
    for (uint32_t i = threadIdx.x * 2; i < in.tokens * OUTPUTS; i += WARPS * WARP * 2) {
        uint32_t token = i / OUTPUTS, row = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (row < e.width) finish_pair<T>(e, token, row, sums[i], sums[i + 1], row + 1 < e.width);
    }
}

#include "choice.cuh"

// Sums with the head's rows, as they are: `out` [tokens, outputs] in f32, and what is to know of
// each block's OUTPUTS of them: `moments` [tokens, blocks], if it is not null.
template <class T, class W, int TILES>
DEVICE void head_logits(const Input& in, const W* w, const float* scales, float* out,
                        Moments* moments, uint32_t outputs) {
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
        if (lane == 0)
            moments[static_cast<size_t>(token) * gridDim.x + blockIdx.x] = Moments{most, sum};
    }
}

#define SKINNY(T, W, suffix, TILES)                                                               \
    KERNEL_SHARED(linear_skinny_##suffix##_##TILES, WARPS* WARP, TILES == 1 ? 3 : 1)              \
    (Input in, const W* w, const float* scales, Epilogue e) {                                     \
        linear_skinny<T, W, TILES>(in, w, scales, e);                                             \
    }                                                                                             \
    EXPORT(linear_skinny_##suffix##_##TILES)                                                      \
    KERNEL_SHARED(head_logits_##suffix##_##TILES, WARPS* WARP, TILES == 1 ? 4 : 0)                \
    (Input in, const W* w, const float* scales, float* out, Moments* moments, uint32_t outputs) { \
        head_logits<T, W, TILES>(in, w, scales, out, moments, outputs);                           \
    }                                                                                             \
    EXPORT(head_logits_##suffix##_##TILES)                                                        \
    KERNEL_SHARED(head_choice_##suffix##_##TILES, WARPS* WARP, TILES == 1 ? 4 : 0)                \
    (Input in, const W* w, const float* scales, Choices choices, uint32_t outputs) {              \
        float* sums = block_sums<T, W, TILES>(in, w, scales, outputs);                            \
        choose_in_block<OUTPUTS>(sums, OUTPUTS, 0, in.tokens, blockIdx.x, choices, outputs);      \
    }                                                                                             \
    EXPORT(head_choice_##suffix##_##TILES)
#define SKINNY_DEEP(T, W, suffix)                                  \
    KERNEL_SHARED(linear_skinny_##suffix##_1_deep, WARPS* WARP, 1) \
    (Input in, const W* w, const float* scales, Epilogue e) {      \
        linear_skinny<T, W, 1, DEEP>(in, w, scales, e);            \
    }                                                              \
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
