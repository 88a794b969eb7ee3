// Choosing a token while the head's products are in shared memory: penalty, bias, temperature,
// Gumbel-max, log-sum-exp.
//
// Each block reduces its own outputs to one `Partial` for each choice; `merge_choices` reduces
// those. Logits never go to memory. Order and meaning are those of src/engine/sampling.rs.
#pragma once
#include "random.cuh"
#include "threads.cuh"

struct Chosen {
    uint32_t token;
    float logprob;
};

// What the head leaves of every MOMENTS_OUTPUTS of its outputs beside their logits.
constexpr int MOMENTS_OUTPUTS = 16;
struct Moments {
    float most, sum; // largest logit, and the sum of exp(logit - most)
};

// Laid out as in src/ops/cuda/sampling.rs.
struct Choice {
    uint32_t row;                          // of the products
    float inverse_temperature;             // 0: the most likely token
    float penalty;                         // of seen tokens
    uint32_t changes_start, changes_count; // tokens whose logits are changed, sorted
    uint32_t forced; // the choice, if there is none: its log-probability is wanted; else 0xffffffff
    uint32_t seed_low, seed_high, candidate, position;
    // for choices by rank and probability: at most so many tokens; of these the most likely ones
    // that together have this probability; and none less likely than this part of the most likely
    // one
    uint32_t top_k;
    float top_p, min_p;
    // the choice of the step before whose token the penalty counts too, else 0xffffffff
    uint32_t fed;
    uint32_t slot; // where the result goes
};

// A token whose logit is not taken as it is.
struct Change {
    uint32_t token; // with SEEN if the penalty counts it
    float bias;     // added after the penalty
};

constexpr uint32_t SEEN = 0x80000000;

struct Partial {
    float score; // of the best token, with penalty, temperature and noise
    uint32_t token;
    float logit;     // of the best token, as the model gave it
    float most, sum; // of all tokens: largest logit, and the sum of exp(logit - most)
};

struct Choices {
    const Choice* list;
    const Change* changes;
    const Chosen* previous; // results of the step before
    Partial* partials;      // [choice, block]
    uint32_t count, blocks;
};

// The token of the step before that counts as seen; no token if there is none.
DEVICE uint32_t fed_token(const Choice& c, const Chosen* previous) {
    return c.fed == 0xffffffff ? c.fed : previous[c.fed].token;
}

// A token's logit with its penalty and bias.
DEVICE float changed(float logit, const Change* changes, const Chosen* previous, const Choice& c,
                     uint32_t token) {
    const Change* list = changes + c.changes_start;
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
    Change found = list[first]; // the list ends with a number that is no token
    bool here = (found.token & ~SEEN) == token;
    if ((here && (found.token & SEEN)) || token == fed_token(c, previous))
        logit = logit > 0 ? logit / c.penalty : logit * c.penalty;
    return here ? logit + found.bias : logit;
}

// Random bits for the four tokens from token / 4 * 4 on.
DEVICE Words draw(const Choice& c, uint32_t token) {
    return philox(c.seed_low, c.seed_high, Words{{token / 4, c.position, c.candidate, 0}});
}
DEVICE float gumbel(uint32_t bits) {
    float u = (static_cast<float>(bits >> 9) + 0.5f) * (1.0f / 8388608.0f);
    return -logf(-logf(u));
}
DEVICE float gumbel(const Choice& c, uint32_t token) {
    Words w = draw(c, token);
    // picked without an index, which would put the words into memory
    uint32_t low = token & 1 ? w.w[1] : w.w[0], high = token & 1 ? w.w[3] : w.w[2];
    return gumbel(token & 2 ? high : low);
}

// A token with its score, and its logit as the model gave it.
struct Scored {
    float score;
    uint32_t token;
    float logit;
};
// The better of two, the lower token if they are equal.
DEVICE Scored better(const Scored& a, const Scored& b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token) ? a : b;
}
DEVICE Scored better_of_lanes(const Scored& s, int mask) {
    return better(s, Scored{shuffle_xor(s.score, mask), shuffle_xor(s.token, mask),
                            shuffle_xor(s.logit, mask)});
}

// The better of two; sums of exponentials brought to one largest logit.
DEVICE Partial merged(const Partial& a, const Partial& b) {
    Scored best = better({a.score, a.token, a.logit}, {b.score, b.token, b.logit});
    Partial p = {best.score, best.token, best.logit, fmaxf(a.most, b.most), 0};
    if (a.sum > 0) p.sum += a.sum * expf(a.most - p.most);
    if (b.sum > 0) p.sum += b.sum * expf(b.most - p.most);
    return p;
}

DEVICE Partial merged_with_lane(const Partial& p, int mask) {
    Partial other = {shuffle_xor(p.score, mask), shuffle_xor(p.token, mask),
                     shuffle_xor(p.logit, mask), shuffle_xor(p.most, mask),
                     shuffle_xor(p.sum, mask)};
    // both lanes must add in the same order
    return lane_index() & mask ? merged(other, p) : merged(p, other);
}

DEVICE Partial nothing() { return Partial{-INFINITY, 0xffffffff, 0, -INFINITY, 0}; }

// Four sums, 16 bytes apart from the next.
DEVICE Four four_sums(const float* at) { return *reinterpret_cast<const Four*>(at); }

// Reduces OUTPUTS products of each choice's row, `number` * OUTPUTS of the head's and those behind,
// to a `Partial`. `sums`: of `tokens` rows from row `first_token` on, `stride` floats apart, in
// shared memory. A lane takes four outputs, whose noise is one draw; a warp has 128 products at a
// time, of several choices if a block has few outputs.
template <int OUTPUTS>
DEVICE void choose_in_block(const float* sums, uint32_t stride, uint32_t first_token,
                            uint32_t tokens, uint32_t number, const Choices& choices,
                            uint32_t outputs) {
    constexpr int LANES = OUTPUTS / 4;    // of a choice
    constexpr int AT_ONCE = WARP / LANES; // choices of a warp
    int lane = lane_index();
    uint32_t first = number * OUTPUTS + lane % LANES * 4;
    for (uint32_t start = warp_index() * AT_ONCE; start < choices.count;
         start += blockDim.x / WARP * AT_ONCE) {
        uint32_t i = start + lane / LANES;
        bool here = i < choices.count;
        const Choice& c = choices.list[here ? i : start];
        here = here && c.row - first_token < tokens;
        if (AT_ONCE == 1 && !here) continue;
        Four logits = {};
        if (here) logits = four_sums(sums + (c.row - first_token) * stride + lane % LANES * 4);
        float most = -INFINITY, sum = 0;
        UNROLL
        for (int j = 0; j < 4; j++) {
            if (first + j < outputs) most = fmaxf(most, logits.v[j]);
        }
        for (int mask = LANES / 2; mask > 0; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
        Scored best = {-INFINITY, 0xffffffff, 0};
        bool noisy = c.forced == 0xffffffff && c.inverse_temperature > 0;
        bool changes = c.forced == 0xffffffff && (c.changes_count > 0 || c.fed != 0xffffffff);
        Words noise = {};
        if (noisy) noise = draw(c, first);
        UNROLL
        for (int j = 0; j < 4; j++) {
            uint32_t token = first + j;
            if (token >= outputs) continue;
            sum += expf(logits.v[j] - most);
            float score = logits.v[j];
            if (c.forced != 0xffffffff) score = token == c.forced ? 0 : -INFINITY;
            if (changes) score = changed(score, choices.changes, choices.previous, c, token);
            if (noisy) score = score * c.inverse_temperature + gumbel(noise.w[j]);
            best = better(best, Scored{score, token, logits.v[j]});
        }
        sync_warp();
        for (int mask = LANES / 2; mask > 0; mask /= 2) {
            sum += shuffle_xor(sum, mask);
            best = better_of_lanes(best, mask);
        }
        if (here && lane % LANES == 0) {
            choices.partials[static_cast<size_t>(i) * choices.blocks + number] =
                Partial{best.score, best.token, best.logit, most, sum};
        }
    }
}
