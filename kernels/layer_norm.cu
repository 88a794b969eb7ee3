// Layer norm of rows, alone and right after the embedding lookup.
//
//   embed_norm: out[t] = norm(table[ids[t]])
//               table [vocabulary, width], out [tokens, width] in f32
//               tokens that the previous step sampled are read from where it wrote them
//   layer_norm: out[r] = norm(x[rows[r]])
//               x [tokens, width] in f32, out [rows, width] in 16 bits
//
// Least bytes: each row is read once and written once; a row of 1536 numbers is 6 KB in f32. One
// warp takes a row, so there is no barrier and no shared memory, and the result of a row cannot
// depend on other rows. Rows of up to 1536 numbers stay in registers between the three passes over
// them (sum, squares, output). Widths are multiples of 8.
#include "embedding.cuh"

static_assert(NORM_ROWS * WARP == NORM_THREADS, "a warp for each row");

template <class T>
DEVICE void embed_norm(float* out, const TokenIds& ids, const T* table, const float* scales,
                       const float* weight, const float* bias, uint32_t tokens, uint32_t width,
                       float eps) {
    griddep_launch_dependents();
    prefetch_l2(weight, width * 4, threadIdx.x, blockDim.x);
    prefetch_l2(bias, width * 4, threadIdx.x, blockDim.x);
    griddep_wait();
    uint32_t token = blockIdx.x * NORM_ROWS + warp_index();
    if (token >= tokens) return;
    embed_row(out, ids, token, table, scales, weight, bias, width, eps);
}

template <class T>
DEVICE void layer_norm(T* out, const float* x, const uint32_t* rows, const float* weight,
                       const float* bias, uint32_t count, uint32_t width, float eps) {
    griddep_launch_dependents();
    prefetch_l2(weight, width * 4, threadIdx.x, blockDim.x);
    prefetch_l2(bias, width * 4, threadIdx.x, blockDim.x);
    griddep_wait();
    uint32_t r = blockIdx.x * NORM_ROWS + warp_index();
    if (r >= count) return;
    FloatRow row = {x + static_cast<size_t>(rows ? rows[r] : r) * width};
    normalize_row(out + static_cast<size_t>(r) * width, row, weight, bias, width, eps);
}

#define EMBED_NORM(T, suffix)                                                            \
    KERNEL(embed_norm_##suffix, NORM_THREADS)                                            \
    (float* out, TokenIds ids, const T* table, const float* scales, const float* weight, \
     const float* bias, uint32_t tokens, uint32_t width, float eps) {                    \
        embed_norm<T>(out, ids, table, scales, weight, bias, tokens, width, eps);        \
    }                                                                                    \
    EXPORT(embed_norm_##suffix)
EMBED_NORM(bf16, bf16)
EMBED_NORM(f16, f16)
EMBED_NORM(int8_t, int8)

#define LAYER_NORM(T)                                                                       \
    KERNEL(layer_norm_##T, NORM_THREADS)                                                    \
    (T * out, const float* x, const uint32_t* rows, const float* weight, const float* bias, \
     uint32_t count, uint32_t width, float eps) {                                           \
        layer_norm<T>(out, x, rows, weight, bias, count, width, eps);                       \
    }                                                                                       \
    EXPORT(layer_norm_##T)
LAYER_NORM(bf16)
LAYER_NORM(f16)
