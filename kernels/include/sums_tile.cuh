// A tile of sums in shared memory, as the products of large tiles leave it, and what the head's
// kernels make of it.
#pragma once
#include "choice.cuh"
#include "memory.cuh"

constexpr int SUMS_OUTPUTS = 128;
// Floats between tokens: pairs of four tokens that are written together share no bank.
constexpr int SUMS_STRIDE = SUMS_OUTPUTS + 8;

// Two neighbouring sums.
struct alignas(8) SumsPair {
    float v[2];
};

struct SumsTile {
    float* sums;          // [token][SUMS_STRIDE]
    uint32_t first_token; // of all
    uint32_t tokens;      // that there are from there on; the tile may hold fewer or more
    uint32_t size;        // tokens that the tile holds
    // of the tile among those of these tokens; its outputs begin at number * SUMS_OUTPUTS
    uint32_t number;

    DEVICE_MEMBER bool holds(uint32_t token) const {
        return token - first_token < (tokens < size ? tokens : size);
    }
    DEVICE_MEMBER void put(int token, int output, float a, float b) const {
        *reinterpret_cast<SumsPair*>(sums + token * SUMS_STRIDE + output) = SumsPair{{a, b}};
    }
    // Four sums of a token, one of all.
    DEVICE_MEMBER Four four(uint32_t token, int output) const {
        return *reinterpret_cast<const Four*>(sums + (token - first_token) * SUMS_STRIDE + output);
    }
};

// The choices from the tile's tokens.
DEVICE void choose_in_tile(const SumsTile& tile, const Choices& choices, uint32_t outputs) {
    uint32_t tokens = tile.tokens < tile.size ? tile.tokens : tile.size;
    choose_in_block<SUMS_OUTPUTS>(tile.sums, SUMS_STRIDE, tile.first_token, tokens, tile.number,
                                  choices, outputs);
}

// Writes the tile's sums as logits, `out` [tokens, outputs], and what is to know of every
// MOMENTS_OUTPUTS of them: `moments` [tokens, blocks], if it is not null.
DEVICE void write_logits(const SumsTile& tile, float* out, Moments* moments, uint32_t outputs) {
    int lane = lane_index();
    uint32_t first = tile.number * SUMS_OUTPUTS + lane * 4;
    uint32_t blocks = (outputs + MOMENTS_OUTPUTS - 1) / MOMENTS_OUTPUTS;
    for (uint32_t token = tile.first_token + warp_index(); tile.holds(token);
         token += blockDim.x / WARP) {
        Four logits = tile.four(token, lane * 4);
        float* row = out + static_cast<size_t>(token) * outputs + first;
        float most = -INFINITY, sum = 0;
        if (outputs % 4 == 0 && first < outputs) {
            *reinterpret_cast<Four*>(row) = logits;
        }
        UNROLL
        for (int j = 0; j < 4; j++) {
            if (first + j >= outputs) continue;
            if (outputs % 4 != 0) row[j] = logits.v[j];
            most = fmaxf(most, logits.v[j]);
        }
        if (!moments) continue;
        static_assert(MOMENTS_OUTPUTS == 16, "those of four lanes");
        for (int mask = 1; mask < 4; mask *= 2) most = fmaxf(most, shuffle_xor(most, mask));
        UNROLL
        for (int j = 0; j < 4; j++) {
            if (first + j < outputs) sum += expf(logits.v[j] - most);
        }
        for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane % 4 == 0 && first < outputs) {
            moments[static_cast<size_t>(token) * blocks + first / MOMENTS_OUTPUTS] =
                Moments{most, sum};
        }
    }
}
