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
// each block finishes a part of the outputs. The result of a token does not depend on other tokens,
// but how inputs are divided depends on the number of multiprocessors.
#include "cluster.cuh"
#include "epilogue.cuh"
#include "tiles_hopper.cuh"

#if HOPPER

// Adds up the sums of the cluster's blocks in order and finishes this block's part of the tile, in
// fours of neighbouring outputs.
template <class T, int TOKENS>
DEVICE void finish_tile(const AccumulatorTile& tile, const EpilogueArgs& e) {
    constexpr uint32_t FOURS = TILE_OUTPUTS / 4, MAX_RANKS = 8;
    uint32_t rank = cluster_rank(), ranks = cluster_size();
    bool whole = e.width % 8 == 0;
    auto place = [&](uint32_t i, uint32_t& token, uint32_t& row) {
        token = tile.first_token + i / FOURS;
        row = tile.number * TILE_OUTPUTS + i % FOURS * 4;
        return i < TOKENS * FOURS && tile.holds(token) && row < e.width;
    };
    uint32_t first = rank * TILE_THREADS + threadIdx.x, token, row;
    // what the sums are added to is loaded while the cluster's blocks wait for each other
    FourInputs inputs = {};
    if (place(first, token, row) && whole) inputs = load_four_inputs<T>(e, token, row);
    cluster_sync();
    for (uint32_t i = first; i < TOKENS * FOURS; i += ranks * TILE_THREADS) {
        if (!place(i, token, row)) continue;
        if (i != first && whole) inputs = load_four_inputs<T>(e, token, row);
        const Float4* mine =
            reinterpret_cast<const Float4*>(tile.sums + i / FOURS * TILE_STRIDE + i % FOURS * 4);
        Float4 part[MAX_RANKS], sum = {};
        UNROLL
        for (uint32_t r = 0; r < MAX_RANKS; r++) {
            part[r] = Float4{};
            if (r < ranks) part[r] = *map_shared_rank(mine, r);
        }
        UNROLL
        for (uint32_t r = 0; r < MAX_RANKS; r++) {
            UNROLL
            for (int j = 0; j < 4; j++) sum.v[j] += part[r].v[j];
        }
        if (whole) {
            finish_four<T>(e, inputs, sum);
            continue;
        }
        UNROLL
        for (int j = 0; j < 4; j += 2) {
            if (row + j < e.width)
                epilogue_pair<T>(e, token, row + j, sum.v[j], sum.v[j + 1], row + j + 1 < e.width);
        }
    }
}

template <class T, int TOKENS>
DEVICE void linear_cluster(const TensorMap* x, const TensorMap* w, uint32_t tokens, uint32_t slices,
                           const EpilogueArgs& e) {
    uint32_t rank = cluster_rank(), ranks = cluster_size();
    AccumulatorTile tile = tile_of_block(tokens, TOKENS, ranks);
    uint32_t first_output = tile.number * TILE_OUTPUTS, left = e.width - first_output;
    prefetch_l2(e.bias + first_output, (left < TILE_OUTPUTS ? left : TILE_OUTPUTS) * 4, threadIdx.x,
                TILE_THREADS);
    accumulate_tile<T, TOKENS>(tile, x, w, slices * rank / ranks, slices * (rank + 1) / ranks);
    finish_tile<T, TOKENS>(tile, e);
    cluster_sync(); // the other blocks have read this one's sums
}

#define LINEAR_CLUSTER(T, TOKENS)                                                       \
    KERNEL_SHARED(linear_cluster_##T##_##TOKENS, TILE_THREADS, 2)                       \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t slices, EpilogueArgs e) {                                                 \
        linear_cluster<T, TOKENS>(&x, &w, tokens, slices, e);                           \
    }                                                                                   \
    EXPORT(linear_cluster_##T##_##TOKENS)
LINEAR_CLUSTER(bf16, 64)
LINEAR_CLUSTER(bf16, 128)
LINEAR_CLUSTER(f16, 64)
LINEAR_CLUSTER(f16, 128)

#endif // HOPPER
