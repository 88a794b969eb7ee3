// y = epilogue(x W^T) for 17 to some hundred tokens on Hopper: the blocks of a cluster divide the
// inputs of a tile (split-K).
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//
// FLOPs: 2 * tokens * inputs * outputs. Least bytes from memory: the weights. A tile is 64 (or 128)
// tokens by 128 outputs: with up to 64 tokens, L2 delivers the weights once and the activations
// once for 128 outputs, which is half of the bytes of the weights.
// At the sizes of the model there are only 12 to 48 tiles. A cluster of up to 8 blocks therefore
// shares each tile, every block with a part of the inputs, so that all multiprocessors stream
// weights. The partial sums are added through the cluster's shared memory in a fixed order, and
// each block finishes a part of the outputs. The layer norm that follows a linear with a residual
// needs whole rows: the cluster that finishes the last tile of some tokens normalizes them, while
// the next kernel loads its first weights. The result of a token does not depend on other tokens,
// but how inputs are divided depends on the number of multiprocessors.
#include "cluster.cuh"
#include "epilogue.cuh"
#include "layer_norm.cuh"
#include "tiles_hopper.cuh"

#if HOPPER

// Normalizes the rows of the tile if this cluster is the last to have written outputs of them.
// `last` is a word in the shared memory of every block.
template <class T, int TOKENS>
DEVICE void normalize_if_last(const AccumulatorTile& tile, const EpilogueArgs& e,
                              const NextNorm& next, uint32_t* last) {
    uint32_t rank = cluster_rank(), ranks = cluster_size();
    if (rank == 0 && threadIdx.x == 0) {
        uint32_t* counter = next.counters + tile.first_token / TOKENS;
        uint32_t is_last = atomic_increment(counter) == gridDim.y - 1;
        if (is_last) *counter = 0;
        for (uint32_t r = 0; r < ranks; r++) *map_shared_rank(last, r) = is_last;
    }
    cluster_sync();
    if (!*last) return;
    device_fence();
    constexpr uint32_t WARPS = TILE_THREADS / WARP;
    for (uint32_t i = rank * WARPS + warp_index(); i < TOKENS && i < tile.tokens;
         i += ranks * WARPS) {
        size_t at = static_cast<size_t>(tile.first_token + i) * e.width;
        FloatRow row = {static_cast<const float*>(e.out) + at};
        normalize_row(static_cast<T*>(next.normed) + at, row, next.weight, next.bias, e.width,
                      next.eps);
    }
}

template <class T, int TOKENS>
DEVICE void linear_cluster(const TensorMap* x, const TensorMap* w, uint32_t tokens, uint32_t slices,
                           const EpilogueArgs& e, const NextNorm& next) {
    uint32_t rank = cluster_rank(), ranks = cluster_size();
    AccumulatorTile tile = tile_of_block(tokens, TOKENS, ranks);
    uint32_t first_output = tile.number * TILE_OUTPUTS, left = e.width - first_output;
    prefetch_l2(e.bias + first_output, (left < TILE_OUTPUTS ? left : TILE_OUTPUTS) * 4, threadIdx.x,
                TILE_THREADS);
    if (next.weight && blockIdx.y == 0) {
        prefetch_l2(next.weight, e.width * 4, threadIdx.x, TILE_THREADS);
        prefetch_l2(next.bias, e.width * 4, threadIdx.x, TILE_THREADS);
    }
    accumulate_tile<T, TOKENS>(tile, x, w, slices * rank / ranks, slices * (rank + 1) / ranks);
    cluster_sync();
    constexpr uint32_t CHUNKS = TILE_OUTPUTS / 8;
    for (uint32_t i = rank * TILE_THREADS + threadIdx.x; i < TOKENS * CHUNKS;
         i += ranks * TILE_THREADS) {
        uint32_t token = tile.first_token + i / CHUNKS,
                 row = tile.number * TILE_OUTPUTS + i % CHUNKS * 8;
        if (!tile.holds(token) || row >= e.width) continue;
        const Float4* mine =
            reinterpret_cast<const Float4*>(tile.sums + i / CHUNKS * TILE_STRIDE + i % CHUNKS * 8);
        float v[8] = {};
        constexpr uint32_t AT_ONCE = 4; // blocks whose sums are loaded at the same time
        for (uint32_t first = 0; first < ranks; first += AT_ONCE) {
            Float4 low[AT_ONCE], high[AT_ONCE];
            UNROLL
            for (uint32_t r = 0; r < AT_ONCE; r++) {
                low[r] = high[r] = Float4{};
                if (first + r >= ranks) continue;
                const Float4* theirs = map_shared_rank(mine, first + r);
                low[r] = theirs[0];
                high[r] = theirs[1];
            }
            UNROLL
            for (uint32_t r = 0; r < AT_ONCE; r++) {
                UNROLL
                for (int j = 0; j < 4; j++) {
                    v[j] += low[r].v[j];
                    v[4 + j] += high[r].v[j];
                }
            }
        }
        epilogue_eight<T>(e, token, row, v);
    }
    cluster_sync(); // the other blocks have read this one's sums, and written their outputs
    if (next.weight)
        normalize_if_last<T, TOKENS>(tile, e, next,
                                     reinterpret_cast<uint32_t*>(tile.sums + TOKENS * TILE_STRIDE));
}

#define LINEAR_CLUSTER(T, TOKENS)                                                       \
    KERNEL_SHARED(linear_cluster_##T##_##TOKENS, TILE_THREADS, 2)                       \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t slices, EpilogueArgs e, NextNorm next) {                                  \
        linear_cluster<T, TOKENS>(&x, &w, tokens, slices, e, next);                     \
    }                                                                                   \
    EXPORT(linear_cluster_##T##_##TOKENS)
LINEAR_CLUSTER(bf16, 64)
LINEAR_CLUSTER(bf16, 128)
LINEAR_CLUSTER(f16, 64)
LINEAR_CLUSTER(f16, 128)

#endif // HOPPER
