// y = epilogue(x W^T) for 17 to some hundred tokens on Hopper: the blocks of a cluster divide the
// inputs of a tile.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//
// FLOPs: 2 * tokens * inputs * outputs; least bytes from memory: the weights. Tiles of 64 (128)
// tokens by 128 outputs: for up to 64 tokens the second-level cache gives the weights once and the
// activations once for 128 outputs, half of the weights' bytes. At the model's sizes that is 12 to
// 48 tiles: a cluster of up to 8 blocks has each of them, each block a part of the inputs, so that
// all multiprocessors stream weights, and the sums of the parts are added through the cluster's
// shared memory, in a fixed order, each block finishing a part of the outputs. The layer norm that
// follows a product with a residual needs whole rows: the cluster that finishes the last tile of
// some tokens normalizes them, while the next kernel's first weights are on their way. A token's
// result does not depend on the other tokens, but the parts depend on the number of
// multiprocessors.
#include "cluster.cuh"
#include "epilogue.cuh"
#include "rows.cuh"
#include "tiles_hopper.cuh"

#if HOPPER

// The layer norm of the results in f32, wanted in 16 bits too. Laid out as in
// src/ops/cuda/linear.rs.
struct NextNorm {
    const float* weight; // null if there is none
    const float* bias;
    void* normed; // [tokens, width]
    // of the clusters that are done, for each tile of tokens: 0 before and after
    uint32_t* counters;
    float eps;
    uint32_t unused;
};

// Normalizes the tile's rows if this cluster is the last to have written some of them. `last`: of
// every block's shared memory.
template <class T, int TOKENS>
DEVICE void normalize_if_last(const SumsTile& tile, const Epilogue& e, const NextNorm& next,
                              uint32_t* last) {
    uint32_t rank = cluster_rank(), ranks = cluster_size();
    if (rank == 0 && threadIdx.x == 0) {
        uint32_t* counter = next.counters + tile.first_token / TOKENS;
        uint32_t is_last = count_up(counter) == gridDim.y - 1;
        if (is_last) *counter = 0;
        for (uint32_t r = 0; r < ranks; r++) *in_cluster(last, r) = is_last;
    }
    sync_cluster();
    if (!*last) return;
    fence_device();
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
                           const Epilogue& e, const NextNorm& next) {
    uint32_t rank = cluster_rank(), ranks = cluster_size();
    SumsTile tile = tile_of_block(tokens, TOKENS, ranks);
    uint32_t first_output = tile.number * SUMS_OUTPUTS, left = e.width - first_output;
    prefetch(e.bias + first_output, (left < SUMS_OUTPUTS ? left : SUMS_OUTPUTS) * 4, threadIdx.x,
             TILE_THREADS);
    if (next.weight && blockIdx.y == 0) {
        prefetch(next.weight, e.width * 4, threadIdx.x, TILE_THREADS);
        prefetch(next.bias, e.width * 4, threadIdx.x, TILE_THREADS);
    }
    tile_sums<T, TOKENS>(tile, x, w, slices * rank / ranks, slices * (rank + 1) / ranks);
    sync_cluster();
    constexpr uint32_t PIECES = SUMS_OUTPUTS / 8;
    for (uint32_t i = rank * TILE_THREADS + threadIdx.x; i < TOKENS * PIECES;
         i += ranks * TILE_THREADS) {
        uint32_t token = tile.first_token + i / PIECES,
                 row = tile.number * SUMS_OUTPUTS + i % PIECES * 8;
        if (!tile.holds(token) || row >= e.width) continue;
        const Four* mine =
            reinterpret_cast<const Four*>(tile.sums + i / PIECES * SUMS_STRIDE + i % PIECES * 8);
        float v[8] = {};
        constexpr uint32_t AT_ONCE = 4; // blocks whose sums are on their way together
        for (uint32_t first = 0; first < ranks; first += AT_ONCE) {
            Four low[AT_ONCE], high[AT_ONCE];
            UNROLL
            for (uint32_t r = 0; r < AT_ONCE; r++) {
                low[r] = high[r] = Four{};
                if (first + r >= ranks) continue;
                const Four* theirs = in_cluster(mine, first + r);
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
        if (e.width % 8 == 0) {
            finish_eight<T>(e, token, row, v);
            continue;
        }
        UNROLL
        for (int j = 0; j < 8; j += 2) {
            if (row + j < e.width)
                finish_pair<T>(e, token, row + j, v[j], v[j + 1], row + j + 1 < e.width);
        }
    }
    sync_cluster(); // the others have read, and written
    if (next.weight)
        normalize_if_last<T, TOKENS>(tile, e, next,
                                     reinterpret_cast<uint32_t*>(tile.sums + TOKENS * SUMS_STRIDE));
}

#define LINEAR_CLUSTER(T, TOKENS)                                                       \
    KERNEL_SHARED(linear_cluster_##T##_##TOKENS, TILE_THREADS, 2)                       \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t slices, Epilogue e, NextNorm next) {                                      \
        linear_cluster<T, TOKENS>(&x, &w, tokens, slices, e, next);                     \
    }                                                                                   \
    EXPORT(linear_cluster_##T##_##TOKENS)
LINEAR_CLUSTER(bf16, 64)
LINEAR_CLUSTER(bf16, 128)
LINEAR_CLUSTER(f16, 64)
LINEAR_CLUSTER(f16, 128)

#endif // HOPPER
