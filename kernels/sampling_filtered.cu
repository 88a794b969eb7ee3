// Choosing a token by rank and probability (top-k, then top-p, then min-p), exactly, from logits in
// memory; and listing the most likely tokens.
//
//   logits [row, vocabulary] in f32 -> chosen [choice] = (token, log-probability)
//                                   -> tops [choice, most] of the same, the likeliest first
//
// Least bytes: what the head's blocks left of every 16 logits, 8 bytes each (125 KB for a
// vocabulary of 250,880, of which the logits are 1 MB), and the logits of those that matter. One
// block of threads for each choice: the k-th largest of the blocks' largest logits bounds the k-th
// largest logit from below, by a radix selection in four passes; blocks beyond it, and those with
// logits that a penalty or bias changes, are looked into. What is not below the bound goes to a
// list in shared memory, is sorted by logit and token, cut to k (ties stay, as in transformers),
// cut by probability, and chosen from by Gumbel-max. Only if the list runs over are the logits
// themselves selected from. Probabilities are added in f64; of listed tokens in the sorted order,
// as on the CPU. Without top-k the list holds the largest MOST, which a cut by probability seldom
// goes beyond. Where it does, or more tokens are wanted or equal than a list holds, there is none:
// the cut is found by a radix selection over probabilities, added as integers, so that their order
// does not matter, and all tokens above it take part, in six passes over the logits. A list of
// likely tokens with too many equals is left to the host: its tokens are TOO_MANY.
#include "choice.cuh"
#include "memory.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int LIST = 2048;
constexpr int MOST = LIST / 2; // is asked for at most; the rest is room for ties
constexpr uint32_t TOO_MANY = 0xfffffffe;

// Keeps the order of floats in unsigned integers.
DEVICE uint32_t ordered(float x) {
    uint32_t bits = bits_of_float(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float of_ordered(uint32_t key) {
    return float_of_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Shared {
    unsigned long long list[LIST]; // ordered logit, then the complement of the token
    double weights[LIST];
    uint32_t histograms[WARPS][256];
    float partial[WARPS][2];
    Partial best[WARPS];
    double total;
    uint32_t count, prefix, left, kept;
    unsigned long long mass; // that is still to be found
    uint32_t changed[1];     // a bit for each token, to the end of shared memory
};

DEVICE float filtered_logit(const float* logits, const uint32_t* bits, const Change* changes,
                            const Chosen* previous, const Choice& c, uint32_t token) {
    float x = logits[token];
    return bits[token / 32] >> (token % 32) & 1 ? changed(x, changes, previous, c, token) : x;
}

// A row of logits, and what the head's blocks say of it.
constexpr uint32_t PER_BLOCK = MOMENTS_OUTPUTS;
struct Row {
    const float* logits;
    const Moments* moments;
    uint32_t vocabulary, blocks;
};
DEVICE Row row_of(const float* logits, const Moments* moments, uint32_t row, uint32_t vocabulary) {
    uint32_t blocks = (vocabulary + PER_BLOCK - 1) / PER_BLOCK;
    return Row{logits + static_cast<size_t>(row) * vocabulary,
               moments + static_cast<size_t>(row) * blocks, vocabulary, blocks};
}

// Log-sum-exp of a row, for all threads.
DEVICE float log_sum_exp(Shared& s, const Row& row) {
    int warp = warp_index(), lane = lane_index();
    float most = -INFINITY;
    for (uint32_t i = threadIdx.x; i < row.blocks; i += THREADS)
        most = fmaxf(most, row.moments[i].most);
    most = warp_max(most);
    if (lane == 0) s.partial[warp][0] = most;
    sync_block();
    for (int i = 0; i < WARPS; i++) most = fmaxf(most, s.partial[i][0]);
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < row.blocks; i += THREADS)
        sum += row.moments[i].sum * expf(row.moments[i].most - most);
    sum = warp_sum(sum);
    if (lane == 0) s.partial[warp][1] = sum;
    sync_block();
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += s.partial[i][1];
    return most + logf(total);
}

// The `k`-th largest of `n` numbers `at(i)`, as `ordered` has it; 0 < k <= n.
template <class At>
DEVICE uint32_t kth_largest(Shared& s, const At& at, uint32_t n, uint32_t k) {
    int warp = warp_index(), lane = lane_index();
    if (threadIdx.x == 0) {
        s.prefix = 0;
        s.left = k;
    }
    // one byte of the k-th largest at a time, from the top
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = lane; i < 256; i += WARP) s.histograms[warp][i] = 0;
        sync_block();
        for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
            uint32_t key = ordered(at(i));
            if (shift == 24 || key >> (shift + 8) == s.prefix)
                add_shared(&s.histograms[warp][key >> shift & 255], 1);
        }
        sync_block();
        if (threadIdx.x < 256) {
            uint32_t total = 0;
            for (int i = 0; i < WARPS; i++) total += s.histograms[i][threadIdx.x];
            s.histograms[0][threadIdx.x] = total;
        }
        sync_block();
        if (threadIdx.x == 0) {
            uint32_t left = s.left;
            int byte = 255;
            while (byte > 0 && s.histograms[0][byte] < left) left -= s.histograms[0][byte--];
            s.left = left;
            s.prefix = s.prefix << 8 | byte;
        }
        sync_block();
    }
    return s.prefix;
}

// Adds a token to the list, if there is room.
DEVICE void list_token(Shared& s, uint32_t key, uint32_t token) {
    uint32_t place = add_shared(&s.count, 1);
    if (place < LIST) s.list[place] = static_cast<unsigned long long>(key) << 32 | ~token;
}

// Lists the `k` largest of a row's numbers `at(token)`, and what equals the smallest of them:
// sorted, `s.count` of them. `changed(block)`: whether the numbers of a block are not all the row's
// logits. False if there are too many.
template <class At, class Changed>
DEVICE bool list_largest(Shared& s, const Row& row, const At& at, const Changed& changed,
                         uint32_t k) {
    auto most = [&](uint32_t i) { return changed(i) ? -INFINITY : row.moments[i].most; };
    uint32_t nothing = ordered(-INFINITY),
             least = k < row.blocks ? kth_largest(s, most, row.blocks, k) : nothing;
    if (threadIdx.x == 0) s.count = 0;
    sync_block();
    if (least != nothing) {
        for (uint32_t i = threadIdx.x; i < row.blocks; i += THREADS) {
            if (!changed(i) && ordered(row.moments[i].most) < least) continue;
            for (uint32_t token = i * PER_BLOCK;
                 token < (i + 1) * PER_BLOCK && token < row.vocabulary; token++) {
                uint32_t key = ordered(at(token));
                if (key >= least) list_token(s, key, token);
            }
        }
        sync_block();
    }
    if (least == nothing || s.count > LIST) {
        sync_block(); // all have seen how many there were
        least = kth_largest(s, at, row.vocabulary, k);
        if (threadIdx.x == 0) s.count = 0;
        sync_block();
        for (uint32_t i = threadIdx.x; i < row.vocabulary; i += THREADS) {
            uint32_t key = ordered(at(i));
            if (key >= least) list_token(s, key, i);
        }
        sync_block();
    }
    uint32_t count = s.count;
    if (count > LIST) return false;
    // bitonic sort, largest first
    uint32_t size = 1;
    while (size < count) size *= 2;
    for (uint32_t i = count + threadIdx.x; i < size; i += THREADS) s.list[i] = 0;
    sync_block();
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t step = run / 2; step > 0; step /= 2) {
            for (uint32_t i = threadIdx.x; i < size; i += THREADS) {
                uint32_t other = i ^ step;
                if (other > i) {
                    unsigned long long a = s.list[i], b = s.list[other];
                    bool descending = (i & run) == 0;
                    if (descending ? a < b : a > b) {
                        s.list[i] = b;
                        s.list[other] = a;
                    }
                }
            }
            sync_block();
        }
    }
    // the bound was from below
    if (threadIdx.x == 0 && count > k) {
        while (s.list[count - 1] >> 32 < s.list[k - 1] >> 32) count--;
        s.count = count;
    }
    sync_block();
    return true;
}

DEVICE float listed_logit(const Shared& s, uint32_t i) {
    return of_ordered(static_cast<uint32_t>(s.list[i] >> 32));
}
DEVICE uint32_t listed_token(const Shared& s, uint32_t i) {
    return ~static_cast<uint32_t>(s.list[i]);
}

// The best of all threads' tokens, for thread 0.
DEVICE Partial best_of_block(Shared& s, Partial best) {
    for (int mask = 16; mask > 0; mask /= 2) best = merged_with_lane(best, mask);
    if (lane_index() == 0) s.best[warp_index()] = best;
    sync_block();
    for (int i = 1; i < WARPS; i++) best = merged(best, s.best[i]);
    return best;
}

// Chooses among the row's numbers `at(token)` without a list. Weights are counted in units of 2^-44
// of the largest one's.
template <class At>
DEVICE Partial choose_among_all(Shared& s, const At& at, const Choice& c, uint32_t vocabulary) {
    // in the memory of the list and of the weights behind it
    unsigned long long (*masses)[256] = reinterpret_cast<unsigned long long (*)[256]>(s.list);
    static_assert(sizeof(s.list) + sizeof(s.weights) == sizeof(unsigned long long) * WARPS * 256,
                  "a histogram for each warp");
    int warp = warp_index(), lane = lane_index();
    uint32_t least =
        c.top_k > 0 && c.top_k < vocabulary ? kth_largest(s, at, vocabulary, c.top_k) : 0;
    float largest = -INFINITY;
    for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) largest = fmaxf(largest, at(i));
    largest = warp_max(largest);
    if (lane == 0) s.partial[warp][0] = largest;
    sync_block();
    for (int i = 0; i < WARPS; i++) largest = fmaxf(largest, s.partial[i][0]);
    auto weight = [&](float x) {
        return exp(static_cast<double>((x - largest) * c.inverse_temperature));
    };
    auto mass = [&](float x) {
        return static_cast<unsigned long long>(weight(x) * 17592186044416.0 + 0.5);
    };
    uint32_t last_tie = vocabulary; // of the tokens with the least number, the last that takes part
    if (c.top_p < 1.0f) {
        for (int shift = 24; shift >= 0; shift -= 8) {
            for (int i = lane; i < 256; i += WARP) masses[warp][i] = 0;
            sync_block();
            for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
                float x = at(i);
                uint32_t key = ordered(x);
                if (key >= least && (shift == 24 || key >> (shift + 8) == s.prefix))
                    add_shared(&masses[warp][key >> shift & 255], mass(x));
            }
            sync_block();
            if (threadIdx.x < 256) {
                unsigned long long sum = 0;
                for (int i = 0; i < WARPS; i++) sum += masses[i][threadIdx.x];
                masses[0][threadIdx.x] = sum;
            }
            sync_block();
            if (threadIdx.x == 0) {
                if (shift == 24) {
                    unsigned long long total = 0;
                    for (int i = 0; i < 256; i++) total += masses[0][i];
                    s.prefix = 0;
                    s.mass =
                        static_cast<unsigned long long>(ceil(c.top_p * static_cast<double>(total)));
                    if (s.mass == 0) s.mass = 1; // the largest takes part in any case
                }
                unsigned long long left = s.mass;
                int byte = 255;
                while (byte > 0 && masses[0][byte] < left) left -= masses[0][byte--];
                s.mass = left;
                s.prefix = s.prefix << 8 | byte;
            }
            sync_block();
        }
        least = s.prefix;
        unsigned long long wanted = s.mass, each = mass(of_ordered(least)),
                           all = masses[0][least & 255];
        sync_block(); // all have seen them
        if (wanted + each <= all) {
            uint32_t ties = static_cast<uint32_t>((wanted + each - 1) / each);
            auto number = [&](uint32_t i) {
                return ordered(at(i)) == least ? -static_cast<float>(i) : -INFINITY;
            };
            last_tie = static_cast<uint32_t>(-of_ordered(kth_largest(s, number, vocabulary, ties)));
        }
    }
    Partial best = nothing();
    for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
        float x = at(i);
        uint32_t key = ordered(x);
        if (key < least || (key == least && i > last_tie) || (c.min_p > 0 && weight(x) < c.min_p))
            continue;
        best = merged(best, Partial{x * c.inverse_temperature + gumbel(c, i), i, 0, 0, 0});
    }
    return best_of_block(s, best);
}

KERNEL_ALONE(choose_filtered, THREADS)
(Chosen* out, const float* all_logits, const Moments* all_moments, const Choice* choices,
 const Change* changes, const Chosen* previous, uint32_t vocabulary) {
    wait_for_earlier_kernels();
    Shared& s = *reinterpret_cast<Shared*>(shared_memory());
    const Choice& c = choices[blockIdx.x];
    uint32_t fed = fed_token(c, previous);
    out += c.slot;
    Row row = row_of(all_logits, all_moments, c.row, vocabulary);
    const float* logits = row.logits;
    for (uint32_t i = threadIdx.x; i < (vocabulary + 31) / 32; i += THREADS) s.changed[i] = 0;
    sync_block();
    for (uint32_t i = threadIdx.x; i < c.changes_count; i += THREADS) {
        uint32_t token = changes[c.changes_start + i].token & ~SEEN;
        set_bits_shared(&s.changed[token / 32], 1u << (token % 32));
    }
    if (threadIdx.x == 0 && fed < vocabulary)
        set_bits_shared(&s.changed[fed / 32], 1u << (fed % 32));
    float lse = log_sum_exp(s, row); // of the model's own logits
    auto at = [&](uint32_t i) {
        return filtered_logit(logits, s.changed, changes, previous, c, i);
    };
    auto changed = [&](uint32_t block) {
        return (s.changed[block / 2] >> (block % 2 * PER_BLOCK) & 0xffff) != 0;
    };
    auto chosen = [&](const Partial& best) {
        if (threadIdx.x == 0) *out = Chosen{best.token, logits[best.token] - lse};
    };
    bool all = c.top_k == 0 || c.top_k >= vocabulary; // is cut by probability
    uint32_t k = all ? (vocabulary < MOST ? vocabulary : MOST) : c.top_k;
    if (k > MOST || !list_largest(s, row, at, changed, k))
        return chosen(choose_among_all(s, at, c, vocabulary));
    uint32_t count = s.count;
    float largest = listed_logit(s, 0);
    auto weight = [&](float x) {
        return exp(static_cast<double>((x - largest) * c.inverse_temperature));
    };
    if (all && count < vocabulary) {
        // the sum of all, thread by thread
        double sum = 0;
        for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) sum += weight(at(i));
        s.weights[threadIdx.x] = sum;
        sync_block();
        if (threadIdx.x == 0) {
            double total = 0;
            for (int i = 0; i < THREADS; i++) total += s.weights[i];
            s.total = total;
        }
        sync_block();
    }
    for (uint32_t i = threadIdx.x; i < count; i += THREADS)
        s.weights[i] = weight(listed_logit(s, i));
    sync_block();
    if (threadIdx.x == 0) {
        double total = 0, before = 0;
        for (uint32_t i = 0; i < count; i++) total += s.weights[i];
        if (all && count < vocabulary) total = s.total;
        uint32_t kept = 0;
        while (kept < count && (kept == 0 || c.top_p >= 1.0f || before < c.top_p * total))
            before += s.weights[kept++];
        // whether tokens beyond the list would be kept as well
        bool open = all && count < vocabulary && kept == count &&
                    (c.top_p >= 1.0f || before < c.top_p * total);
        while (kept > 1 && s.weights[kept - 1] < c.min_p) {
            kept--;
            open = false;
        }
        s.kept = open ? 0 : kept;
    }
    sync_block();
    if (s.kept == 0) return chosen(choose_among_all(s, at, c, vocabulary));
    Partial best = nothing();
    for (uint32_t i = threadIdx.x; i < s.kept; i += THREADS) {
        uint32_t token = listed_token(s, i);
        best = merged(best, Partial{listed_logit(s, i) * c.inverse_temperature + gumbel(c, token),
                                    token, 0, 0, 0});
    }
    chosen(best_of_block(s, best));
}
EXPORT(choose_filtered)

// What is wanted of a row; laid out as in src/ops/cuda/sampling.rs.
struct Top {
    uint32_t row, count;
};

KERNEL_ALONE(list_top, THREADS)
(Chosen* out, const float* all_logits, const Moments* all_moments, const Top* tops, uint32_t most,
 uint32_t vocabulary) {
    wait_for_earlier_kernels();
    Shared& s = *reinterpret_cast<Shared*>(shared_memory());
    Top top = tops[blockIdx.x];
    Row row = row_of(all_logits, all_moments, top.row, vocabulary);
    float lse = log_sum_exp(s, row);
    bool listed = list_largest(
        s, row, [&](uint32_t i) { return row.logits[i]; }, [](uint32_t) { return false; },
        top.count);
    for (uint32_t i = threadIdx.x; i < most; i += THREADS) {
        Chosen c = {TOO_MANY, 0};
        if (listed && i < top.count) c = Chosen{listed_token(s, i), listed_logit(s, i) - lse};
        out[static_cast<size_t>(blockIdx.x) * most + i] = c;
    }
}
EXPORT(list_top)
