// y = epilogue(x W^T) for many tokens on every GPU since Ampere, with cp.async and mma; also the LM
// head for many rows.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits, or W in 8 bits with a scale for each row
//
// FLOPs: 2 * tokens * inputs * outputs. Least bytes: both operands and the result once. L2 delivers
// (128 + 128) * inputs elements for a tile of 128 * 128 outputs, which is 64 FLOPs for each byte.
// A block computes 128 tokens by 128 outputs in 8 warps of 64 by 32. The next two slices of 64
// inputs are copied during the computation of this one. Rows in shared memory are 128 bytes, with
// their 16-byte chunks swizzled so that ldmatrix has no bank conflicts. The inputs of an output are
// added in one order, whatever the other tokens are. Results go through shared memory, so that
// whole lines are written and read; tokens are sampled from there.
#include "accumulator_tile.cuh"
#include "epilogue.cuh"
#include "linear.cuh"
#include "memory.cuh"
#include "mma.cuh"

constexpr int THREADS = LINEAR_LARGE_THREADS;
constexpr int TILE = LINEAR_LARGE_TILE;
constexpr int SLICE = LINEAR_SLICE;
constexpr int STAGES = LINEAR_LARGE_STAGES;
constexpr int WARP_M = 64, WARP_N = 32;

// Bytes between rows of weights in shared memory.
template <class W>
DEVICE constexpr int weight_stride() {
    // rows of 8-bit weights are 20 words apart, so that eight rows lie in different banks
    return sizeof(W) == 2 ? SLICE * 2 : SLICE + 16;
}
template <class W>
DEVICE constexpr int stage_bytes() {
    return TILE * SLICE * 2 + TILE * weight_stride<W>();
}

// Where the 16-byte chunk `c` of row `r` lies in a slice of 16-bit rows.
DEVICE int swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

template <class T, class W>
DEVICE void load_slice(char* stage, const LinearArgs& in, const W* w, uint32_t outputs,
                       uint32_t first_token, uint32_t first_output, uint32_t k) {
    const T* x = static_cast<const T*>(in.x);
    UNROLL
    for (int i = 0; i < TILE * 8 / THREADS; i++) {
        int chunk = threadIdx.x + i * THREADS, r = chunk / 8, c = chunk % 8;
        uint32_t token = first_token + r, at = k + c * 8;
        bool valid = token < in.tokens && at < in.inputs;
        cp_async(stage + swizzled(r, c),
                 valid ? x + static_cast<size_t>(token) * in.inputs + at : x, valid);
    }
    char* weights = stage + TILE * SLICE * 2;
    constexpr int CHUNKS = SLICE * sizeof(W) / 16; // chunks in a row
    constexpr int INPUTS = 16 / sizeof(W);         // inputs in a chunk
    UNROLL
    for (int i = 0; i < TILE * CHUNKS / THREADS; i++) {
        int chunk = threadIdx.x + i * THREADS, r = chunk / CHUNKS, c = chunk % CHUNKS;
        uint32_t row = first_output + r, at = k + c * INPUTS;
        bool valid = row < outputs && at < in.inputs;
        char* to = weights + (sizeof(W) == 2 ? swizzled(r, c) : r * weight_stride<W>() + c * 16);
        cp_async(to, valid ? w + static_cast<size_t>(row) * in.inputs + at : w, valid);
    }
}

// Loads the operands for 32 outputs from `first` on and 16 inputs, from a slice of 16-bit weights.
template <class T>
DEVICE void weight_operands(uint32_t (&b)[4][2], const char* weights, int first, int step,
                            const T*) {
    int lane = lane_index();
    UNROLL
    for (int n = 0; n < 2; n++) {
        uint32_t four[4];
        ldmatrix_x4(four, weights + swizzled(first + n * 16 + lane / 16 * 8 + lane % 8,
                                             step * 2 + lane / 8 % 2));
        b[2 * n][0] = four[0];
        b[2 * n][1] = four[1];
        b[2 * n + 1][0] = four[2];
        b[2 * n + 1][1] = four[3];
    }
}
// The same from a slice of 8-bit weights.
template <class T>
DEVICE void weight_operands(uint32_t (&b)[4][2], const char* weights, int first, int step,
                            const int8_t*) {
    int g = lane_index() / 4, t = lane_index() % 4;
    UNROLL
    for (int n = 0; n < 4; n++) {
        const char* row =
            weights + (first + n * 8 + g) * weight_stride<int8_t>() + step * 16 + 2 * t;
        UNROLL
        for (int half = 0; half < 2; half++) {
            uint16_t two = *reinterpret_cast<const uint16_t*>(row + half * 8);
            b[n][half] = pack<T>(static_cast<float>(static_cast<int8_t>(two)),
                                 static_cast<float>(static_cast<int8_t>(two >> 8)));
        }
    }
}

// A warp's accumulators, ordered as by mma_m16n8k16, and the first token and output of the warp in
// the tile.
struct WarpTile {
    float c[4][4][4] = {};
    int m0, n0;
};

template <class T, class W>
DEVICE WarpTile accumulate_warp(const LinearArgs& in, const W* w, uint32_t outputs,
                                uint32_t first_token, uint32_t first_output) {
    char* shared = shared_memory();
    int slices = (in.inputs + SLICE - 1) / SLICE;
    griddep_wait();
    UNROLL
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < slices)
            load_slice<T, W>(shared + s * stage_bytes<W>(), in, w, outputs, first_token,
                             first_output, s * SLICE);
        cp_async_commit_group();
    }
    int lane = lane_index();
    WarpTile sums;
    sums.m0 = warp_index() / 4 * WARP_M;
    sums.n0 = warp_index() % 4 * WARP_N;
    for (int s = 0; s < slices; s++) {
        cp_async_wait_group<STAGES - 2>();
        block_sync(); // this slice has arrived, and all warps have read the one before it
        int next = s + STAGES - 1;
        if (next < slices) {
            load_slice<T, W>(shared + next % STAGES * stage_bytes<W>(), in, w, outputs, first_token,
                             first_output, next * SLICE);
        }
        cp_async_commit_group();
        const char* stage = shared + s % STAGES * stage_bytes<W>();
        UNROLL
        for (int step = 0; step < SLICE / 16; step++) {
            uint32_t a[4][4], b[4][2];
            UNROLL
            for (int m = 0; m < 4; m++) {
                ldmatrix_x4(a[m],
                            stage + swizzled(sums.m0 + m * 16 + lane % 16, step * 2 + lane / 16));
            }
            weight_operands<T>(b, stage + TILE * SLICE * 2, sums.n0, step, w);
            UNROLL
            for (int m = 0; m < 4; m++) {
                UNROLL
                for (int n = 0; n < 4; n++) mma_m16n8k16<T>(sums.c[m][n], a[m], b[n]);
            }
        }
    }
    griddep_launch_dependents();
    return sums;
}

// Computes the tile of 128 tokens from `first_token` on by the outputs of tile `number`, and leaves
// it in shared memory, scaled if the weights have scales.
template <class T, class W>
DEVICE AccumulatorTile accumulate_large(const LinearArgs& in, const W* w, const float* scales,
                                        uint32_t outputs, uint32_t first_token, uint32_t number) {
    static_assert(TILE == TILE_OUTPUTS, "the tiles of all kernels have the same outputs");
    static_assert(TILE * TILE_STRIDE * 4 <= STAGES * stage_bytes<W>(), "room for the accumulators");
    WarpTile sums = accumulate_warp<T, W>(in, w, outputs, first_token, number * TILE);
    AccumulatorTile tile = {reinterpret_cast<float*>(shared_memory()), first_token,
                            in.tokens - first_token, TILE, number};
    cp_async_wait_group<0>();
    block_sync(); // all warps have read the last slice
    int g = lane_index() / 4, t = lane_index() % 4;
    UNROLL
    for (int n = 0; n < 4; n++) {
        int output = sums.n0 + n * 8 + 2 * t;
        uint32_t row = number * TILE + output;
        float scale[2] = {scales && row < outputs ? scales[row] : 1.0f,
                          scales && row + 1 < outputs ? scales[row + 1] : 1.0f};
        UNROLL
        for (int m = 0; m < 4; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                tile.put(sums.m0 + m * 16 + half * 8 + g, output, sums.c[m][n][2 * half] * scale[0],
                         sums.c[m][n][2 * half + 1] * scale[1]);
            }
        }
    }
    block_sync();
    return tile;
}

template <class T, class W>
DEVICE void linear_large(const LinearArgs& in, const W* w, const float* scales,
                         const EpilogueArgs& e) {
    AccumulatorTile tile =
        accumulate_large<T, W>(in, w, scales, e.width, blockIdx.y * TILE, blockIdx.x);
    constexpr uint32_t CHUNKS = TILE / 8;
    for (uint32_t i = threadIdx.x; i < TILE * CHUNKS; i += THREADS) {
        uint32_t token = tile.first_token + i / CHUNKS, row = tile.number * TILE + i % CHUNKS * 8;
        if (!tile.holds(token) || row >= e.width) continue;
        Float4 low = tile.four(token, i % CHUNKS * 8), high = tile.four(token, i % CHUNKS * 8 + 4);
        float v[8] = {low.v[0],  low.v[1],  low.v[2],  low.v[3],
                      high.v[0], high.v[1], high.v[2], high.v[3]};
        epilogue_eight<T>(e, token, row, v);
    }
}

// A tile of the LM head. Tokens are along x, so that consecutive blocks read the same weights.
template <class T, class W>
DEVICE AccumulatorTile lm_head_tile(const LinearArgs& in, const W* w, const float* scales,
                                    uint32_t outputs) {
    return accumulate_large<T, W>(in, w, scales, outputs, blockIdx.x * TILE, blockIdx.y);
}

#define LARGE(T, W, suffix)                                                                    \
    KERNEL(linear_large_##suffix, THREADS)                                                     \
    (LinearArgs in, const W* w, const float* scales, EpilogueArgs e) {                         \
        linear_large<T, W>(in, w, scales, e);                                                  \
    }                                                                                          \
    EXPORT(linear_large_##suffix)                                                              \
    KERNEL(lm_head_sample_large_##suffix, THREADS)                                             \
    (LinearArgs in, const W* w, const float* scales, SamplingArgs choices, uint32_t outputs) { \
        sample_in_tile(lm_head_tile<T, W>(in, w, scales, outputs), choices, outputs);          \
    }                                                                                          \
    EXPORT(lm_head_sample_large_##suffix)                                                      \
    KERNEL(lm_head_logits_large_##suffix, THREADS)                                             \
    (LinearArgs in, const W* w, const float* scales, float* out, SoftmaxStats* moments,        \
     uint32_t outputs) {                                                                       \
        write_logits(lm_head_tile<T, W>(in, w, scales, outputs), out, moments, outputs);       \
    }                                                                                          \
    EXPORT(lm_head_logits_large_##suffix)
LARGE(bf16, bf16, bf16)
LARGE(f16, f16, f16)
LARGE(bf16, int8_t, bf16_int8)
LARGE(f16, int8_t, f16_int8)
