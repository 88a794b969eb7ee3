// y = epilogue(x W^T) for many tokens: tiles that the tensor cores share, on every GPU since
// Ampere.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits, or W in 8 bits with a scale for each row
//
// FLOPs: 2 * tokens * inputs * outputs; least bytes: both operands and the result once, a block
// reads (128 + 128) * inputs elements for 128 * 128 outputs, 64 FLOPs a byte from the second-level
// cache. A block computes 128 tokens by 128 outputs in 8 warps of 64 by 32; copies of the next two
// slices of 64 inputs run behind the products of this one. Rows in shared memory are 128 bytes,
// their 16-byte pieces swizzled so that the operands' loads meet no bank twice. Each output is
// summed along the inputs in one order, whatever the other tokens. The head's tiles stay in shared
// memory, where tokens are chosen or logits written in whole lines.
#include "epilogue.cuh"
#include "linear.cuh"
#include "memory.cuh"
#include "sums_tile.cuh"
#include "tensor_core.cuh"

constexpr int THREADS = 256;
constexpr int TILE = 128; // tokens, and outputs, of a block
constexpr int SLICE = 64; // inputs at a time
constexpr int STAGES = 3;
constexpr int WARP_M = 64, WARP_N = 32;

// Bytes between rows of a slice of weights in shared memory.
template <class W>
DEVICE constexpr int weight_stride() {
    return sizeof(W) == 2 ? SLICE * 2
                          : SLICE + 16; // 8-bit rows 20 words apart: no two of eight in one bank
}
template <class W>
DEVICE constexpr int stage_bytes() {
    return TILE * SLICE * 2 + TILE * weight_stride<W>();
}

// Where piece `c` (16 bytes) of row `r` lies in a slice of 16-bit rows.
DEVICE int swizzled(int r, int c) { return r * 128 + ((c ^ (r & 7)) << 4); }

template <class T, class W>
DEVICE void load_slice(char* stage, const Input& in, const W* w, uint32_t outputs,
                       uint32_t first_token, uint32_t first_output, uint32_t k) {
    const T* x = static_cast<const T*>(in.x);
    UNROLL
    for (int i = 0; i < TILE * 8 / THREADS; i++) {
        int piece = threadIdx.x + i * THREADS, r = piece / 8, c = piece % 8;
        uint32_t token = first_token + r, at = k + c * 8;
        bool valid = token < in.tokens && at < in.inputs;
        copy_async(stage + swizzled(r, c),
                   valid ? x + static_cast<size_t>(token) * in.inputs + at : x, valid);
    }
    char* weights = stage + TILE * SLICE * 2;
    constexpr int PIECES = SLICE * sizeof(W) / 16; // of a row
    constexpr int EACH = 16 / sizeof(W);           // inputs of a piece
    UNROLL
    for (int i = 0; i < TILE * PIECES / THREADS; i++) {
        int piece = threadIdx.x + i * THREADS, r = piece / PIECES, c = piece % PIECES;
        uint32_t row = first_output + r, at = k + c * EACH;
        bool valid = row < outputs && at < in.inputs;
        char* to = weights + (sizeof(W) == 2 ? swizzled(r, c) : r * weight_stride<W>() + c * 16);
        copy_async(to, valid ? w + static_cast<size_t>(row) * in.inputs + at : w, valid);
    }
}

// The operands of 32 outputs from `first` on and 16 inputs, of a slice of 16-bit weights.
template <class T>
DEVICE void weight_operands(uint32_t (&b)[4][2], const char* weights, int first, int step,
                            const T*) {
    int lane = lane_index();
    UNROLL
    for (int n = 0; n < 2; n++) {
        uint32_t four[4];
        load_matrices(four, weights + swizzled(first + n * 16 + lane / 16 * 8 + lane % 8,
                                               step * 2 + lane / 8 % 2));
        b[2 * n][0] = four[0];
        b[2 * n][1] = four[1];
        b[2 * n + 1][0] = four[2];
        b[2 * n + 1][1] = four[3];
    }
}
// The same of 8-bit weights.
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

// Sums of a warp: 16 tokens by 8 outputs each, as `multiply` leaves them, from its place in the
// tile on.
struct WarpSums {
    float c[4][4][4] = {};
    int m0, n0;
};

template <class T, class W>
DEVICE WarpSums warp_sums(const Input& in, const W* w, uint32_t outputs, uint32_t first_token,
                          uint32_t first_output) {
    char* shared = shared_memory();
    int slices = (in.inputs + SLICE - 1) / SLICE;
    wait_for_earlier_kernels();
    UNROLL
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < slices)
            load_slice<T, W>(shared + s * stage_bytes<W>(), in, w, outputs, first_token,
                             first_output, s * SLICE);
        copy_commit();
    }
    int lane = lane_index();
    WarpSums sums;
    sums.m0 = warp_index() / 4 * WARP_M;
    sums.n0 = warp_index() % 4 * WARP_N;
    for (int s = 0; s < slices; s++) {
        copy_wait<STAGES - 2>();
        sync_block(); // this slice is here, and nobody uses the one before it any more
        int next = s + STAGES - 1;
        if (next < slices) {
            load_slice<T, W>(shared + next % STAGES * stage_bytes<W>(), in, w, outputs, first_token,
                             first_output, next * SLICE);
        }
        copy_commit();
        const char* stage = shared + s % STAGES * stage_bytes<W>();
        UNROLL
        for (int step = 0; step < SLICE / 16; step++) {
            uint32_t a[4][4], b[4][2];
            UNROLL
            for (int m = 0; m < 4; m++) {
                load_matrices(a[m],
                              stage + swizzled(sums.m0 + m * 16 + lane % 16, step * 2 + lane / 16));
            }
            weight_operands<T>(b, stage + TILE * SLICE * 2, sums.n0, step, w);
            UNROLL
            for (int m = 0; m < 4; m++) {
                UNROLL
                for (int n = 0; n < 4; n++) multiply<T>(sums.c[m][n], a[m], b[n]);
            }
        }
    }
    let_next_kernel_begin();
    return sums;
}

// Gives `write(token, output, a, b)` two neighbouring sums at a time, by their places in the tile,
// of which the last may be beyond the matrix; scaled if the weights are.
template <class Write>
DEVICE void each_pair(const WarpSums& sums, const float* scales, uint32_t outputs,
                      uint32_t first_output, const Write& write) {
    int g = lane_index() / 4, t = lane_index() % 4;
    UNROLL
    for (int n = 0; n < 4; n++) {
        int output = sums.n0 + n * 8 + 2 * t;
        uint32_t row = first_output + output;
        float scale[2] = {scales && row < outputs ? scales[row] : 1.0f,
                          scales && row + 1 < outputs ? scales[row + 1] : 1.0f};
        UNROLL
        for (int m = 0; m < 4; m++) {
            UNROLL
            for (int half = 0; half < 2; half++) {
                write(sums.m0 + m * 16 + half * 8 + g, output, sums.c[m][n][2 * half] * scale[0],
                      sums.c[m][n][2 * half + 1] * scale[1]);
            }
        }
    }
}

template <class T, class W>
DEVICE void linear_large(const Input& in, const W* w, const float* scales, const Epilogue& e) {
    uint32_t first_output = blockIdx.x * TILE, first_token = blockIdx.y * TILE;
    WarpSums sums = warp_sums<T, W>(in, w, e.width, first_token, first_output);
    each_pair(sums, scales, e.width, first_output, [&](int token, int output, float a, float b) {
        uint32_t row = first_output + output;
        if (first_token + token < in.tokens && row < e.width) {
            finish_pair<T>(e, first_token + token, row, a, b, row + 1 < e.width);
        }
    });
}

// Leaves the sums of a tile of the head in shared memory: tokens along x, so that blocks that
// follow each other share weights.
template <class T, class W>
DEVICE SumsTile head_tile(const Input& in, const W* w, const float* scales, uint32_t outputs) {
    static_assert(TILE == SUMS_OUTPUTS, "a tile's outputs");
    static_assert(TILE * SUMS_STRIDE * 4 <= STAGES * stage_bytes<W>(), "room for the sums");
    uint32_t first_token = blockIdx.x * TILE, first_output = blockIdx.y * TILE;
    WarpSums sums = warp_sums<T, W>(in, w, outputs, first_token, first_output);
    SumsTile tile = {reinterpret_cast<float*>(shared_memory()), first_token,
                     in.tokens - first_token, TILE, blockIdx.y};
    copy_wait<0>();
    sync_block(); // the stages are used no more
    each_pair(sums, scales, outputs, first_output,
              [&](int token, int output, float a, float b) { tile.put(token, output, a, b); });
    sync_block();
    return tile;
}

#define LARGE(T, W, suffix)                                                                       \
    KERNEL(linear_large_##suffix, THREADS)                                                        \
    (Input in, const W* w, const float* scales, Epilogue e) {                                     \
        linear_large<T, W>(in, w, scales, e);                                                     \
    }                                                                                             \
    EXPORT(linear_large_##suffix)                                                                 \
    KERNEL(head_choice_large_##suffix, THREADS)                                                   \
    (Input in, const W* w, const float* scales, Choices choices, uint32_t outputs) {              \
        choose_in_tile(head_tile<T, W>(in, w, scales, outputs), choices, outputs);                \
    }                                                                                             \
    EXPORT(head_choice_large_##suffix)                                                            \
    KERNEL(head_logits_large_##suffix, THREADS)                                                   \
    (Input in, const W* w, const float* scales, float* out, Moments* moments, uint32_t outputs) { \
        write_logits(head_tile<T, W>(in, w, scales, outputs), out, moments, outputs);             \
    }                                                                                             \
    EXPORT(head_logits_large_##suffix)
LARGE(bf16, bf16, bf16)
LARGE(f16, f16, f16)
LARGE(bf16, int8_t, bf16_int8)
LARGE(f16, int8_t, f16_int8)
