// Attention over the paged KV cache with ALiBi, one query at a time; see attention_decode.cuh. A
// block of 4 warps takes one head of one query and up to 512 positions.
#include "attention_decode.cuh"

constexpr int WARPS = 4;
constexpr int SPLIT = 512; // positions of one block of threads

#define ATTEND(T, SIZE)                                                               \
    KERNEL_SHARED(attend_##T##_##SIZE, WARPS* WARP, SIZE > 96 ? 3 : 4)(Attention a) { \
        let_next_kernel_begin(); /* its first weights come meanwhile */               \
        wait_for_earlier_kernels();                                                   \
        float* shared = reinterpret_cast<float*>(shared_memory());                    \
        attend<T, SIZE, WARPS, SPLIT>(a, blockIdx.x, blockIdx.y, blockIdx.z, shared); \
    }                                                                                 \
    EXPORT(attend_##T##_##SIZE)
#define ATTEND_ALL(T) \
    ATTEND(T, 32)     \
    ATTEND(T, 64)     \
    ATTEND(T, 80)     \
    ATTEND(T, 96)     \
    ATTEND(T, 128)
ATTEND_ALL(bf16)
ATTEND_ALL(f16)

// Copies a cache block's keys and values in all layers: `cache` [layer, keys or values, block,
// block_words].
KERNEL(copy_cache_block, 256)(Eight* cache, uint32_t from, uint32_t to, uint32_t blocks,
                              uint32_t block_words) {
    wait_for_earlier_kernels();
    Eight* part = cache + static_cast<size_t>(blockIdx.x) * blocks * block_words;
    for (uint32_t i = threadIdx.x; i < block_words; i += blockDim.x) {
        part[static_cast<size_t>(to) * block_words + i] =
            part[static_cast<size_t>(from) * block_words + i];
    }
}
EXPORT(copy_cache_block)
