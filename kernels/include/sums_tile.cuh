// A tile of sums in shared memory, as the products of large tiles leave it, and what the head's kernels make of it.
#pragma once
#include "choice.cuh"
#include "memory.cuh"

constexpr int SUMS_OUTPUTS = 128;
constexpr int SUMS_STRIDE = SUMS_OUTPUTS + 4; // floats between tokens: eight of them share no bank with the next eight

// Two neighbouring sums.
struct alignas(8) SumsPair {
    float v[2];
};

struct SumsTile {
    float* sums;          // [token][SUMS_STRIDE]
    uint32_t first_token; // of all
    uint32_t tokens;      // that there are from there on; the tile may hold fewer or more
    uint32_t size;        // tokens that the tile holds
    uint32_t number;      // of the tile among those of these tokens; its outputs begin at number * SUMS_OUTPUTS

    DEVICE_MEMBER bool holds(uint32_t token) const { return token - first_token < (tokens < size ? tokens : size); }
    DEVICE_MEMBER void put(int token, int output, float a, float b) const {
        *reinterpret_cast<SumsPair*>(sums + token * SUMS_STRIDE + output) = SumsPair{{a, b}};
    }
    // Four sums of a token, one of all.
    DEVICE_MEMBER Four four(uint32_t token, int output) const {
        return *reinterpret_cast<const Four*>(sums + (token - first_token) * SUMS_STRIDE + output);
    }
};

// Reduces the tile's outputs to one `Partial` for each choice from one of its tokens. A lane takes four outputs: their noise is one draw.
DEVICE void choose_in_tile(const SumsTile& tile, const Choices& choices, uint32_t outputs) {
    int lane = lane_index();
    uint32_t first = tile.number * SUMS_OUTPUTS + lane * 4;
    for (uint32_t i = warp_index(); i < choices.count; i += blockDim.x / WARP) {
        const Choice& c = choices.list[i];
        if (!tile.holds(c.row)) continue;
        Four logits = tile.four(c.row, lane * 4);
        float most = -INFINITY, sum = 0;
        UNROLL
        for (int j = 0; j < 4; j++) {
            if (first + j < outputs) most = fmaxf(most, logits.v[j]);
        }
        most = warp_max(most);
        Scored best = {-INFINITY, 0xffffffff, 0};
        bool noisy = c.forced == 0xffffffff && c.inverse_temperature > 0;
        bool changes = c.changes_count > 0 || c.fed != 0xffffffff;
        Words noise = {};
        if (noisy) noise = draw(c, first);
        UNROLL
        for (int j = 0; j < 4; j++) {
            uint32_t token = first + j;
            if (token >= outputs) continue;
            sum += expf(logits.v[j] - most);
            float score = logits.v[j];
            if (c.forced != 0xffffffff) {
                score = token == c.forced ? 0 : -INFINITY;
            } else {
                if (changes) score = changed(score, choices.changes, choices.previous, c, token);
                if (noisy) score = score * c.inverse_temperature + gumbel(noise.w[j]);
            }
            best = better(best, Scored{score, token, logits.v[j]});
        }
        sum = warp_sum(sum);
        for (int mask = 16; mask > 0; mask /= 2) best = better_of_lanes(best, mask);
        if (lane == 0) {
            choices.partials[static_cast<size_t>(i) * choices.blocks + tile.number] =
                Partial{best.score, best.token, best.logit, most, sum};
        }
    }
}

// Writes the tile's sums as logits, `out` [tokens, outputs], and what is to know of every MOMENTS_OUTPUTS of them: `moments` [tokens,
// blocks], if it is not null.
DEVICE void write_logits(const SumsTile& tile, float* out, Moments* moments, uint32_t outputs) {
    int lane = lane_index();
    uint32_t first = tile.number * SUMS_OUTPUTS + lane * 4;
    uint32_t blocks = (outputs + MOMENTS_OUTPUTS - 1) / MOMENTS_OUTPUTS;
    for (uint32_t token = tile.first_token + warp_index(); tile.holds(token); token += blockDim.x / WARP) {
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
            moments[static_cast<size_t>(token) * blocks + first / MOMENTS_OUTPUTS] = Moments{most, sum};
        }
    }
}
