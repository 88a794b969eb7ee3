// y = epilogue(x W^T) for 17 to some hundred tokens on Hopper: the blocks of a cluster divide the inputs of a tile.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//
// FLOPs: 2 * tokens * inputs * outputs; least bytes from memory: the weights. Tiles of 64 (128) tokens by 128 outputs: for up to 64 tokens the
// second-level cache gives the weights once and the activations once for 128 outputs, half of the weights' bytes. At the model's sizes that
// is 12 to 48 tiles: a cluster of up to 8 blocks has each of them, each block a part of the inputs, so that all multiprocessors stream
// weights, and the sums of the parts are added through the cluster's shared memory, in a fixed order, each block finishing a part of the
// outputs. A token's result does not depend on the other tokens, but the parts depend on the number of multiprocessors.
#include "cluster.cuh"
#include "epilogue.cuh"
#include "tiles_hopper.cuh"

#if HOPPER

template <class T, int TOKENS>
DEVICE void linear_cluster(const TensorMap* x, const TensorMap* w, uint32_t tokens, uint32_t slices, const Epilogue& e) {
    uint32_t rank = cluster_rank(), ranks = cluster_size();
    SumsTile tile = tile_of_block(tokens, TOKENS, ranks);
    tile_sums<T, TOKENS>(tile, x, w, slices * rank / ranks, slices * (rank + 1) / ranks);
    sync_cluster();
    constexpr uint32_t PIECES = SUMS_OUTPUTS / 8;
    for (uint32_t i = rank * TILE_THREADS + threadIdx.x; i < TOKENS * PIECES; i += ranks * TILE_THREADS) {
        uint32_t token = tile.first_token + i / PIECES, row = tile.number * SUMS_OUTPUTS + i % PIECES * 8;
        if (!tile.holds(token) || row >= e.width) continue;
        const Four* mine = reinterpret_cast<const Four*>(tile.sums + i / PIECES * SUMS_STRIDE + i % PIECES * 8);
        float v[8] = {};
        for (uint32_t r = 0; r < ranks; r++) {
            const Four* theirs = in_cluster(mine, r);
            Four low = theirs[0], high = theirs[1];
            UNROLL
            for (int j = 0; j < 4; j++) {
                v[j] += low.v[j];
                v[4 + j] += high.v[j];
            }
        }
        if (e.width % 8 == 0) {
            finish_eight<T>(e, token, row, v);
            continue;
        }
        UNROLL
        for (int j = 0; j < 8; j += 2) {
            if (row + j < e.width) finish_pair<T>(e, token, row + j, v[j], v[j + 1], row + j + 1 < e.width);
        }
    }
    sync_cluster(); // the others have read
}

#define LINEAR_CLUSTER(T, TOKENS)                                                                                      \
    KERNEL_SHARED(linear_cluster_##T##_##TOKENS, TILE_THREADS, 2)                                                      \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, uint32_t slices, Epilogue e) { \
        linear_cluster<T, TOKENS>(&x, &w, tokens, slices, e);                                                          \
    }                                                                                                                  \
    EXPORT(linear_cluster_##T##_##TOKENS)
LINEAR_CLUSTER(bf16, 64)
LINEAR_CLUSTER(bf16, 128)
LINEAR_CLUSTER(f16, 64)
LINEAR_CLUSTER(f16, 128)

#endif // HOPPER
