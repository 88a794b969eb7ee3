// Attention over the paged KV cache with ALiBi, one query at a time; attention_decode.cuh says how.
// A block of 4 warps takes one head of one query and up to 512 positions.
#include "attention_decode.cuh"

constexpr int WARPS = ATTENTION_DECODE_WARPS;
constexpr int SPLIT = ATTENTION_DECODE_SPLIT;

#define ATTENTION_DECODE(T, SIZE)                                                            \
    KERNEL_SHARED(attention_decode_##T##_##SIZE, WARPS* WARP,                                \
                  SIZE > 96 ? 3 : 4)(AttentionArgs a) {                                      \
        griddep_launch_dependents(); /* the next linear loads its first weights meanwhile */ \
        griddep_wait();                                                                      \
        float* shared = reinterpret_cast<float*>(shared_memory());                           \
        uint32_t head = blockIdx.x, number = blockIdx.y, split = blockIdx.z;                 \
        DecodeQuery query = load_decode_query<WARPS, SPLIT>(a, head, number, split);         \
        attention_decode<T, SIZE, WARPS, SPLIT>(a, query, head, number, split, shared);      \
    }                                                                                        \
    EXPORT(attention_decode_##T##_##SIZE)
#define ATTENTION_DECODE_ALL(T) \
    ATTENTION_DECODE(T, 32)     \
    ATTENTION_DECODE(T, 64)     \
    ATTENTION_DECODE(T, 80)     \
    ATTENTION_DECODE(T, 96)     \
    ATTENTION_DECODE(T, 128)
ATTENTION_DECODE_ALL(bf16)
ATTENTION_DECODE_ALL(f16)

// Copies the keys and values of a cache block in all layers. The cache is [layer, keys or values,
// block, block_words].
KERNEL(copy_cache_block, 256)(Pack16B* cache, uint32_t from, uint32_t to, uint32_t blocks,
                              uint32_t block_words) {
    griddep_wait();
    Pack16B* cache_part = cache + static_cast<size_t>(blockIdx.x) * blocks * block_words;
    for (uint32_t i = threadIdx.x; i < block_words; i += blockDim.x) {
        cache_part[static_cast<size_t>(to) * block_words + i] =
            cache_part[static_cast<size_t>(from) * block_words + i];
    }
}
EXPORT(copy_cache_block)
