// A tile of accumulators in shared memory, where a block's warps leave the results of a GEMM, and
// what the LM head's kernels do with it.
#pragma once
#include "memory.cuh"
#include "sampling.cuh"

constexpr int TILE_OUTPUTS = LINEAR_CLUSTER_OUTPUTS;
// Floats between tokens. The padding puts the pairs of four tokens that a warp writes together into
// different banks.
constexpr int TILE_STRIDE = TILE_OUTPUTS + 8;

struct AccumulatorTile {
    float* sums;          // [token][TILE_STRIDE], in shared memory
    uint32_t first_token; // the first token of the tile
    // how many tokens there are from there on, which may be more or fewer than `size`
    uint32_t tokens;
    uint32_t size; // how many tokens the tile has room for
    // the number of the tile among those of these tokens: its outputs begin at number *
    // TILE_OUTPUTS
    uint32_t number;

    DEVICE_MEMBER bool holds(uint32_t token) const {
        return token - first_token < (tokens < size ? tokens : size);
    }
    DEVICE_MEMBER void put(int token, int output, float a, float b) const {
        *reinterpret_cast<Float2*>(sums + token * TILE_STRIDE + output) = Float2{{a, b}};
    }
    // Four neighbouring accumulators of a token, whose number is that in the whole batch.
    DEVICE_MEMBER Float4 four(uint32_t token, int output) const {
        return *reinterpret_cast<const Float4*>(sums + (token - first_token) * TILE_STRIDE +
                                                output);
    }
};

// Samples from those rows of the tile that a job is for.
DEVICE void sample_in_tile(const AccumulatorTile& tile, const SamplingArgs& jobs,
                           uint32_t outputs) {
    uint32_t tokens = tile.tokens < tile.size ? tile.tokens : tile.size;
    sample_in_block<TILE_OUTPUTS>(tile.sums, TILE_STRIDE, tile.first_token, tokens, tile.number,
                                  jobs, outputs);
}

// Writes the tile as logits, `out` [tokens, outputs], and unless `stats` is null the softmax
// statistics of every STATS_OUTPUTS of them, `stats` [tokens, groups].
DEVICE void write_logits(const AccumulatorTile& tile, float* out, SoftmaxStats* stats,
                         uint32_t outputs) {
    int lane = lane_index();
    uint32_t first = tile.number * TILE_OUTPUTS + lane * 4;
    uint32_t groups = (outputs + STATS_OUTPUTS - 1) / STATS_OUTPUTS;
    for (uint32_t token = tile.first_token + warp_index(); tile.holds(token);
         token += blockDim.x / WARP) {
        Float4 logits = tile.four(token, lane * 4);
        float* row = out + static_cast<size_t>(token) * outputs + first;
        float max = -INFINITY, sum_exp = 0;
        if (outputs % 4 == 0 && first < outputs) {
            *reinterpret_cast<Float4*>(row) = logits;
        }
        UNROLL
        for (int j = 0; j < 4; j++) {
            if (first + j >= outputs) continue;
            if (outputs % 4 != 0) row[j] = logits.v[j];
            max = fmaxf(max, logits.v[j]);
        }
        if (!stats) continue;
        static_assert(STATS_OUTPUTS == 16, "four lanes hold one group");
        for (int mask = 1; mask < 4; mask *= 2) max = fmaxf(max, shuffle_xor(max, mask));
        UNROLL
        for (int j = 0; j < 4; j++) {
            if (first + j < outputs) sum_exp += expf(logits.v[j] - max);
        }
        for (int mask = 1; mask < 4; mask *= 2) sum_exp += shuffle_xor(sum_exp, mask);
        if (lane % 4 == 0 && first < outputs) {
            stats[static_cast<size_t>(token) * groups + first / STATS_OUTPUTS] =
                SoftmaxStats{max, sum_exp};
        }
    }
}
