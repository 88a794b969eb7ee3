// GEMMs of training on Hopper, with TMA and wgmma; operands in 16 bits, sums in f32. Layouts as in
// gemm_train.cu: A is x, and B is W.
//
//   nn   C = A B      A [m, k], B [k, n]    gradients of inputs: dX = dY W
//   tn   C += A^T B   A [k, m], B [k, n]    gradients of weights: dW += dY^T X, k are the tokens
//   tn_sums                                 the same, and the sums of A over k for a bias
//
// (nt, the logits, is linear_hopper.) Tiles and their order are those of gemm_hopper.cuh: operands
// whose inner dimension goes through the rows come in tiles of 64 by 64 as they lie in memory, and
// are transposed by the tensor cores as they read them. The sums of A are one more instruction of 8
// columns beside each of 256, also where nobody asks for them: in a branch of its own it would have
// the others wait for each other. Where there are fewer tiles than multiprocessors,
// blocks take parts of the inner dimension, which gemm_combine adds in their order.
#include "gemm_hopper.cuh"

#if HOPPER

static_assert(GEMM_HOPPER_ONES_AT % 1024 == 0, "the tile of ones is aligned");
static_assert(GEMM_HOPPER_SHARED_BYTES == GEMM_HOPPER_ONES_AT + ONES_BYTES, "and has room");

#define GEMM_HOPPER(layout, ...)                                                               \
    KERNEL_ALONE(gemm_hopper_##layout##_bf16, THREADS)                                         \
    (const GRID_CONSTANT TensorMap a, const GRID_CONSTANT TensorMap b, uint32_t m, uint32_t k, \
     EpilogueArgs e, GemmDivision division) {                                                  \
        gemm_hopper<bf16, Layout<__VA_ARGS__>>(&a, &b, m, k, e, division);                     \
    }                                                                                          \
    EXPORT(gemm_hopper_##layout##_bf16)
GEMM_HOPPER(nn, false, true, false, true)
GEMM_HOPPER(tn, true, true, false, true)
GEMM_HOPPER(tn_sums, true, true, true, true)

#endif // HOPPER
