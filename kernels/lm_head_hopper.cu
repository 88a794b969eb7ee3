// The LM head for more than 16 rows on Hopper, with sampling from its accumulators in shared
// memory.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//     -> partial samples [job, tile], or logits [tokens, outputs] in f32
//
// FLOPs: 2 * tokens * inputs * outputs. Sampling takes about 570 warp instructions for 128 logits
// of a job (noise, exponentials, maxima), which overlap with the tensor core work of the other
// block on the multiprocessor. Least bytes from memory: the weights, once, because tiles of the
// same outputs and different tokens run one after the other. From L2: the weights once for 64 (or
// 128) tokens, the activations once for 128 outputs.
#include "tiles_hopper.cuh"

#if HOPPER

#define LM_HEAD_HOPPER(T, TOKENS)                                                       \
    KERNEL_SHARED(lm_head_sample_hopper_##T##_##TOKENS, TILE_THREADS, 2)                \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t slices, SamplingArgs args, uint32_t outputs) {                            \
        AccumulatorTile tile = tile_of_block(tokens, TOKENS, 1);                        \
        accumulate_tile<T, TOKENS>(tile, &x, &w, 0, slices);                            \
        sample_in_tile(tile, args, outputs);                                            \
    }                                                                                   \
    EXPORT(lm_head_sample_hopper_##T##_##TOKENS)                                        \
    KERNEL_SHARED(lm_head_logits_hopper_##T##_##TOKENS, TILE_THREADS, 2)                \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t slices, float* out, SoftmaxStats* moments, uint32_t outputs) {            \
        AccumulatorTile tile = tile_of_block(tokens, TOKENS, 1);                        \
        accumulate_tile<T, TOKENS>(tile, &x, &w, 0, slices);                            \
        write_logits(tile, out, moments, outputs);                                      \
    }                                                                                   \
    EXPORT(lm_head_logits_hopper_##T##_##TOKENS)
LM_HEAD_HOPPER(bf16, 64)
LM_HEAD_HOPPER(bf16, 128)
LM_HEAD_HOPPER(f16, 64)
LM_HEAD_HOPPER(f16, 128)

#endif // HOPPER
