// Tiles of 64 or 128 tokens by 128 outputs on Hopper, for products of too few tokens to fill the
// GPU with larger ones.
#pragma once
#include "slices.cuh"
#include "sums_tile.cuh"

#if HOPPER

// Two warpgroups multiply, one warp more has the slices brought. Two blocks share a multiprocessor:
// one's slices come while the other finishes its sums.
constexpr int TILE_CONSUMERS = 2 * WARPGROUP;
constexpr int TILE_THREADS = TILE_CONSUMERS + WARP;

// Leaves the sums over slices `begin` to `end` in shared memory, for all threads. Slices of weights
// are asked for before the kernel waits for those it follows. Shared memory: the ring, whose stages
// the sums take over.
template <class T, int TOKENS>
DEVICE void tile_sums(const SumsTile& tile, const TensorMap* x, const TensorMap* w, uint32_t begin,
                      uint32_t end) {
    constexpr int STAGES = TOKENS == 64 ? 4 : 3;
    using Ring = Slices<TOKENS, SUMS_OUTPUTS, STAGES>;
    static_assert(TOKENS * SUMS_STRIDE * 4 <= Ring::BARRIERS_AT, "room for the sums");
    if (threadIdx.x == TILE_CONSUMERS) {
        prefetch_map(w);
        prefetch_map(x);
    }
    Ring ring(shared_memory(), TILE_CONSUMERS / WARP);
    let_next_kernel_begin(); // its blocks may take the places that this kernel's leave
    uint32_t slices = end - begin, first_output = tile.number * SUMS_OUTPUTS;
    if (threadIdx.x >= TILE_CONSUMERS) {
        if (lane_index() == 0) {
            uint32_t early = slices < STAGES ? slices : STAGES;
            for (uint32_t s = 0; s < early; s++) {
                ring.claim(s);
                ring.bring_w(s, w, first_output, begin + s);
            }
            wait_for_earlier_kernels();
            for (uint32_t s = 0; s < slices; s++) {
                if (s >= early) {
                    ring.claim(s);
                    ring.bring_w(s, w, first_output, begin + s);
                }
                ring.bring_x(s, x, tile.first_token, begin + s);
            }
        }
    } else {
        // each warpgroup has half of the tile: of its outputs, or of its tokens
        constexpr int N = TOKENS == 64 ? SUMS_OUTPUTS / 2 : SUMS_OUTPUTS;
        int group = warpgroup_index(), lane = lane_index();
        int token = TOKENS == 64 ? 0 : group * 64, output = TOKENS == 64 ? group * N : 0;
        float d[N / 2];
        uint32_t turn = 0;
        ring.template multiply<T, N>(d, turn, slices, token, output);
        sync_some(1, TILE_CONSUMERS); // the stages are used no more
        token += warp_index() % 4 * 16 + lane / 4;
        UNROLL
        for (int j = 0; j < N / 8; j++) {
            tile.put(token, output + 8 * j + 2 * (lane % 4), d[4 * j], d[4 * j + 1]);
            tile.put(token + 8, output + 8 * j + 2 * (lane % 4), d[4 * j + 2], d[4 * j + 3]);
        }
    }
    sync_block();
    wait_for_earlier_kernels();
}

// The tile of a block: tokens along x, outputs along y; blocks of a cluster share one.
DEVICE SumsTile tile_of_block(uint32_t tokens, uint32_t size, uint32_t cluster) {
    uint32_t first = blockIdx.x / cluster * size;
    return SumsTile{reinterpret_cast<float*>(shared_memory()), first, tokens - first, size,
                    blockIdx.y};
}

#endif // HOPPER
