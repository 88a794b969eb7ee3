// The head's products with more than 16 tokens on Hopper, and the choice of tokens while they are
// in shared memory.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//     -> partials [choice, tile], or logits [tokens, outputs] in f32
//
// FLOPs: 2 * tokens * inputs * outputs, and about 570 instructions of a warp for 128 products of a
// choice (noise, exponentials, maxima), which run beside the tensor cores of the block that shares
// the multiprocessor. Least bytes from memory: the weights, once: tiles of different tokens with
// the same outputs follow each other. From the second-level cache: weights once for 64 (128)
// tokens, activations once for 128 outputs.
#include "tiles_hopper.cuh"

#if HOPPER

#define HEAD_HOPPER(T, TOKENS)                                                          \
    KERNEL_SHARED(head_choice_hopper_##T##_##TOKENS, TILE_THREADS, 2)                   \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t slices, Choices choices, uint32_t outputs) {                              \
        SumsTile tile = tile_of_block(tokens, TOKENS, 1);                               \
        tile_sums<T, TOKENS>(tile, &x, &w, 0, slices);                                  \
        choose_in_tile(tile, choices, outputs);                                         \
    }                                                                                   \
    EXPORT(head_choice_hopper_##T##_##TOKENS)                                           \
    KERNEL_SHARED(head_logits_hopper_##T##_##TOKENS, TILE_THREADS, 2)                   \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t slices, float* out, Moments* moments, uint32_t outputs) {                 \
        SumsTile tile = tile_of_block(tokens, TOKENS, 1);                               \
        tile_sums<T, TOKENS>(tile, &x, &w, 0, slices);                                  \
        write_logits(tile, out, moments, outputs);                                      \
    }                                                                                   \
    EXPORT(head_logits_hopper_##T##_##TOKENS)
HEAD_HOPPER(bf16, 64)
HEAD_HOPPER(bf16, 128)
HEAD_HOPPER(f16, 64)
HEAD_HOPPER(f16, 128)

#endif // HOPPER
