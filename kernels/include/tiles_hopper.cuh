// GEMM tiles of 64 or 128 tokens by 128 outputs on Hopper, for batches of too few tokens to fill
// the GPU with larger tiles.
#pragma once
#include "accumulator_tile.cuh"
#include "tma_pipeline.cuh"

#if HOPPER

// Two warpgroups run wgmma, one more warp issues the TMA copies. Two blocks share a multiprocessor:
// the copies of one overlap with the epilogue of the other.
constexpr int TILE_CONSUMERS = 2 * WARPGROUP;
constexpr int TILE_THREADS = TILE_CONSUMERS + WARP;
static_assert(TILE_THREADS == LINEAR_CLUSTER_THREADS, "as the host launches it");

// Computes the tile over slices `begin` to `end` of the inputs and leaves it in shared memory,
// where all threads may read it. Slices of weights are requested before griddep_wait, since weights
// do not depend on the previous kernel. The tile takes over the shared memory of the pipeline.
template <class T, int TOKENS>
DEVICE void accumulate_tile(const AccumulatorTile& tile, const TensorMap* x, const TensorMap* w,
                            uint32_t begin, uint32_t end) {
    constexpr int STAGES = TOKENS == 64 ? 4 : 3;
    using Pipeline = TmaPipeline<TOKENS, TILE_OUTPUTS, STAGES>;
    static_assert(TOKENS * TILE_STRIDE * 4 <= Pipeline::BARRIERS_AT, "room for the accumulators");
    if (threadIdx.x == TILE_CONSUMERS) {
        prefetch_tensormap(w);
        prefetch_tensormap(x);
    }
    Pipeline pipeline(shared_memory(), TILE_CONSUMERS / WARP);
    // blocks of the next kernel may start where blocks of this one have ended
    griddep_launch_dependents();
    uint32_t slices = end - begin, first_output = tile.number * TILE_OUTPUTS;
    if (threadIdx.x >= TILE_CONSUMERS) {
        if (lane_index() == 0) {
            uint32_t early = slices < STAGES ? slices : STAGES;
            for (uint32_t s = 0; s < early; s++) {
                pipeline.producer_acquire(s);
                pipeline.load_w(s, w, first_output, begin + s);
            }
            griddep_wait();
            for (uint32_t s = 0; s < slices; s++) {
                if (s >= early) {
                    pipeline.producer_acquire(s);
                    pipeline.load_w(s, w, first_output, begin + s);
                }
                pipeline.load_x(s, x, tile.first_token, begin + s);
            }
        }
    } else {
        // each warpgroup computes half of the tile: half of its outputs, or of its tokens
        constexpr int N = TOKENS == 64 ? TILE_OUTPUTS / 2 : TILE_OUTPUTS;
        int group = warpgroup_index(), lane = lane_index();
        int token = TOKENS == 64 ? 0 : group * 64, output = TOKENS == 64 ? group * N : 0;
        float d[N / 2];
        uint32_t iteration = 0;
        pipeline.template mainloop<T, N>(d, iteration, slices, token, output);
        named_barrier_sync(1, TILE_CONSUMERS); // both warpgroups have read their last slice
        token += warp_index() % 4 * 16 + lane / 4;
        UNROLL
        for (int j = 0; j < N / 8; j++) {
            tile.put(token, output + 8 * j + 2 * (lane % 4), d[4 * j], d[4 * j + 1]);
            tile.put(token + 8, output + 8 * j + 2 * (lane % 4), d[4 * j + 2], d[4 * j + 3]);
        }
    }
    block_sync();
    griddep_wait();
}

// The tile of a block: tokens along x, outputs along y. The blocks of a cluster work on the same
// tile.
DEVICE AccumulatorTile tile_of_block(uint32_t tokens, uint32_t size, uint32_t cluster) {
    uint32_t first = blockIdx.x / cluster * size;
    return AccumulatorTile{reinterpret_cast<float*>(shared_memory()), first, tokens - first, size,
                           blockIdx.y};
}

#endif // HOPPER
