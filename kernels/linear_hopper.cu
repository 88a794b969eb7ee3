// y = epilogue(x W^T) for many tokens on Hopper, with TMA and wgmma.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//
// FLOPs: 2 * tokens * inputs * outputs.
// Its tiles are those of gemm_hopper.cuh.
#include "gemm_hopper.cuh"

#if HOPPER

#define LINEAR_HOPPER(T)                                                                 \
    KERNEL_ALONE(linear_hopper_##T, THREADS)                                             \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens,  \
     uint32_t inputs, EpilogueArgs e) {                                                  \
        gemm_hopper<T, Layout<false, false>>(&x, &w, tokens, inputs, e, GemmDivision{}); \
    }                                                                                    \
    EXPORT(linear_hopper_##T)
LINEAR_HOPPER(bf16)
LINEAR_HOPPER(f16)

#endif // HOPPER
