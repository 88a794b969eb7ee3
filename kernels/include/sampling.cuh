// Sampling a token from accumulators of the LM head while they are in shared memory: repetition
// penalty, logit bias, temperature, Gumbel-max, and log-sum-exp for the log-probability.
//
// Each block reduces its own outputs to one `PartialSample` for each job, and merge_samples reduces
// those: logits are never written to memory. The order of the steps and their meaning are those of
// the CPU's sampler.
#pragma once
#include "random.cuh"
#include "threads.cuh"

// The token sampled in the previous step that the penalty counts too; no token if there is none.
DEVICE uint32_t pending_token(const SamplingJob& c, const SampledToken* previous) {
    return c.pending == ABSENT ? c.pending : previous[c.pending].token;
}

// A token's logit after penalty and bias.
DEVICE float changed(float logit, const LogitChange* changes, const SampledToken* previous,
                     const SamplingJob& c, uint32_t token) {
    const LogitChange* list = changes + c.changes_start;
    uint32_t first = 0, count = c.changes_count;
    while (count > 0) {
        uint32_t half = count / 2;
        if ((list[first + half].token & ~SEEN) < token) {
            first += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    LogitChange found = list[first]; // the list ends with a number that is no token
    bool here = (found.token & ~SEEN) == token;
    if ((here && (found.token & SEEN)) || token == pending_token(c, previous))
        logit = logit > 0 ? logit / c.penalty : logit * c.penalty;
    return here ? logit + found.bias : logit;
}

// Random bits for the four tokens from token / 4 * 4 on.
DEVICE Philox4 draw(const SamplingJob& c, uint32_t token) {
    return philox(c.seed_low, c.seed_high, Philox4{{token / 4, c.position, c.candidate, 0}});
}
DEVICE float gumbel(uint32_t bits) {
    float u = (static_cast<float>(bits >> 9) + 0.5f) * (1.0f / 8388608.0f);
    return -logf(-logf(u));
}
DEVICE float gumbel(const SamplingJob& c, uint32_t token) {
    Philox4 w = draw(c, token);
    // selected without an index, which would put the array into local memory
    uint32_t low = token & 1 ? w.w[1] : w.w[0], high = token & 1 ? w.w[3] : w.w[2];
    return gumbel(token & 2 ? high : low);
}

// A token with its score, and its logit as the model gave it.
struct ScoredToken {
    float score;
    uint32_t token;
    float logit;
};
// The better of two; of equals the one with the lower token.
DEVICE ScoredToken better(const ScoredToken& a, const ScoredToken& b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token) ? a : b;
}
DEVICE ScoredToken better_of_lanes(const ScoredToken& s, int mask) {
    return better(s, ScoredToken{shuffle_xor(s.score, mask), shuffle_xor(s.token, mask),
                                 shuffle_xor(s.logit, mask)});
}

// The better of two samples, with the sums of exponentials brought to a common maximum.
DEVICE PartialSample merge(const PartialSample& a, const PartialSample& b) {
    ScoredToken best = better({a.score, a.token, a.logit}, {b.score, b.token, b.logit});
    PartialSample p = {best.score, best.token, best.logit, fmaxf(a.max, b.max), 0};
    if (a.sum_exp > 0) p.sum_exp += a.sum_exp * expf(a.max - p.max);
    if (b.sum_exp > 0) p.sum_exp += b.sum_exp * expf(b.max - p.max);
    return p;
}

DEVICE PartialSample merge_with_lane(const PartialSample& p, int mask) {
    PartialSample other = {shuffle_xor(p.score, mask), shuffle_xor(p.token, mask),
                           shuffle_xor(p.logit, mask), shuffle_xor(p.max, mask),
                           shuffle_xor(p.sum_exp, mask)};
    // both lanes must add in the same order
    return lane_index() & mask ? merge(other, p) : merge(p, other);
}

DEVICE PartialSample no_sample() { return PartialSample{-INFINITY, ABSENT, 0, -INFINITY, 0}; }

// Reduces the OUTPUTS logits of the LM head from `number` * OUTPUTS on to one `PartialSample` for
// each job whose row is here. `logits` holds them in shared memory for `tokens` rows from row
// `first_token` on, `stride` floats apart. A lane takes four outputs, for which one call of Philox
// makes the noise. A warp takes 128 logits at a time, of several jobs if a block has few outputs.
template <int OUTPUTS>
DEVICE void sample_in_block(const float* logits, uint32_t stride, uint32_t first_token,
                            uint32_t tokens, uint32_t number, const SamplingArgs& args,
                            uint32_t outputs) {
    constexpr int LANES = OUTPUTS / 4; // lanes for each job
    constexpr int JOBS = WARP / LANES; // jobs that a warp takes at a time
    int lane = lane_index();
    uint32_t first = number * OUTPUTS + lane % LANES * 4;
    for (uint32_t start = warp_index() * JOBS; start < args.count;
         start += blockDim.x / WARP * JOBS) {
        uint32_t i = start + lane / LANES;
        bool here = i < args.count;
        const SamplingJob& c = args.jobs[here ? i : start];
        here = here && c.row - first_token < tokens;
        if (JOBS == 1 && !here) continue;
        Float4 x = {};
        if (here) {
            const float* row = logits + (c.row - first_token) * stride;
            x = *reinterpret_cast<const Float4*>(row + lane % LANES * 4);
        }
        float max = -INFINITY, sum_exp = 0;
        UNROLL
        for (int j = 0; j < 4; j++) {
            if (first + j < outputs) max = fmaxf(max, x.v[j]);
        }
        for (int mask = LANES / 2; mask > 0; mask /= 2) max = fmaxf(max, shuffle_xor(max, mask));
        ScoredToken best = {-INFINITY, ABSENT, 0};
        bool noisy = c.forced == ABSENT && c.inverse_temperature > 0;
        bool edits = c.forced == ABSENT && (c.changes_count > 0 || c.pending != ABSENT);
        Philox4 noise = {};
        if (noisy) noise = draw(c, first);
        UNROLL
        for (int j = 0; j < 4; j++) {
            uint32_t token = first + j;
            if (token >= outputs) continue;
            sum_exp += expf(x.v[j] - max);
            float score = x.v[j];
            if (c.forced != ABSENT) score = token == c.forced ? 0 : -INFINITY;
            if (edits) score = changed(score, args.changes, args.previous, c, token);
            if (noisy) score = score * c.inverse_temperature + gumbel(noise.w[j]);
            best = better(best, ScoredToken{score, token, x.v[j]});
        }
        warp_sync();
        for (int mask = LANES / 2; mask > 0; mask /= 2) {
            sum_exp += shuffle_xor(sum_exp, mask);
            best = better_of_lanes(best, mask);
        }
        if (here && lane % LANES == 0) {
            args.partials[static_cast<size_t>(i) * args.blocks + number] =
                PartialSample{best.score, best.token, best.logit, max, sum_exp};
        }
    }
}
