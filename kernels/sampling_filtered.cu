// Sampling with top-k, then top-p, then min-p, exactly, from logits in memory; and listing the most
// likely tokens.
//
//   logits [row, vocabulary] in f32 -> out [job] = (token, log-probability)
//                                   -> top tokens [request, max_count] of the same, likeliest first
//
// Least bytes: the softmax statistics of every 16 logits, 8 bytes each (125 KB for a vocabulary of
// 250,880, whose logits are 1 MB), and the few logits that matter.
// One block takes each job. The k-th largest of the groups' maxima is a lower bound of the k-th
// largest logit; a radix selection finds it in four passes. Only groups that reach the bound, and
// groups with logits that a penalty or bias changes, are read. The logits that reach the bound go
// to a list in shared memory, which is sorted by logit and token, cut to k (ties stay, as in
// transformers), cut by probability, and sampled from by Gumbel-max. If the list overflows, the
// radix selection runs over the logits themselves. Probabilities are added in f64, those of listed
// tokens in sorted order, as on the CPU.
// Without top-k the list holds the MAX_LISTED largest, which suffice for almost every cut by
// probability. Where they do not, or where more tokens are wanted or tied than a list holds, there
// is no list: a radix selection over probabilities finds the cut, with integer sums, whose order
// does not matter, and all tokens above it take part, in six passes over the logits. A list of top
// tokens with too many ties is left to the host: its tokens are TOO_MANY.
#include "memory.cuh"
#include "sampling.cuh"

constexpr int THREADS = FILTERED_THREADS;
constexpr int WARPS = THREADS / WARP;
constexpr int LIST = FILTERED_LIST;
constexpr int MAX_LISTED = FILTERED_MAX_LISTED;

// Maps floats to unsigned integers in the same order, and back.
DEVICE uint32_t ordered(float x) {
    uint32_t bits = float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float of_ordered(uint32_t key) {
    return uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Shared {
    unsigned long long list[LIST]; // the ordered logit above the complement of the token
    double weights[LIST];
    uint32_t histograms[WARPS][256];
    float partial[WARPS][2];
    PartialSample best[WARPS];
    double total;
    uint32_t count, prefix, left, kept;
    unsigned long long mass; // the probability mass that is still to be found
    uint32_t changed[1];     // one bit for each token, to the end of shared memory
};
static_assert(offsetof(Shared, changed) == FILTERED_SHARED_BYTES, "as the host reserves it");

DEVICE float filtered_logit(const float* logits, const uint32_t* bits, const LogitChange* changes,
                            const SampledToken* previous, const SamplingJob& c, uint32_t token) {
    float x = logits[token];
    return bits[token / 32] >> (token % 32) & 1 ? changed(x, changes, previous, c, token) : x;
}

// A row of logits with its softmax statistics.
constexpr uint32_t GROUP = STATS_OUTPUTS;
struct Row {
    const float* logits;
    const SoftmaxStats* stats;
    uint32_t vocabulary, groups;
};
DEVICE Row row_of(const float* logits, const SoftmaxStats* stats, uint32_t row,
                  uint32_t vocabulary) {
    uint32_t groups = (vocabulary + GROUP - 1) / GROUP;
    return Row{logits + static_cast<size_t>(row) * vocabulary,
               stats + static_cast<size_t>(row) * groups, vocabulary, groups};
}

// Log-sum-exp of a row, returned to all threads.
DEVICE float log_sum_exp(Shared& s, const Row& row) {
    int warp = warp_index(), lane = lane_index();
    float max = -INFINITY;
    for (uint32_t i = threadIdx.x; i < row.groups; i += THREADS) max = fmaxf(max, row.stats[i].max);
    max = warp_max(max);
    if (lane == 0) s.partial[warp][0] = max;
    block_sync();
    for (int i = 0; i < WARPS; i++) max = fmaxf(max, s.partial[i][0]);
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < row.groups; i += THREADS)
        sum += row.stats[i].sum_exp * expf(row.stats[i].max - max);
    sum = warp_sum(sum);
    if (lane == 0) s.partial[warp][1] = sum;
    block_sync();
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += s.partial[i][1];
    return max + logf(total);
}

// The k-th largest of the `n` numbers `at(i)`, as `ordered` maps it; 0 < k <= n.
template <class At>
DEVICE uint32_t kth_largest(Shared& s, const At& at, uint32_t n, uint32_t k) {
    int warp = warp_index(), lane = lane_index();
    if (threadIdx.x == 0) {
        s.prefix = 0;
        s.left = k;
    }
    // finds one byte of the k-th largest in each pass, from the highest
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = lane; i < 256; i += WARP) s.histograms[warp][i] = 0;
        block_sync();
        for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
            uint32_t key = ordered(at(i));
            if (shift == 24 || key >> (shift + 8) == s.prefix)
                atomic_add_shared(&s.histograms[warp][key >> shift & 255], 1);
        }
        block_sync();
        if (threadIdx.x < 256) {
            uint32_t total = 0;
            for (int i = 0; i < WARPS; i++) total += s.histograms[i][threadIdx.x];
            s.histograms[0][threadIdx.x] = total;
        }
        block_sync();
        if (threadIdx.x == 0) {
            uint32_t left = s.left;
            int byte = 255;
            while (byte > 0 && s.histograms[0][byte] < left) left -= s.histograms[0][byte--];
            s.left = left;
            s.prefix = s.prefix << 8 | byte;
        }
        block_sync();
    }
    return s.prefix;
}

// Adds a token to the list if there is room.
DEVICE void list_token(Shared& s, uint32_t key, uint32_t token) {
    uint32_t slot = atomic_add_shared(&s.count, 1);
    if (slot < LIST) s.list[slot] = static_cast<unsigned long long>(key) << 32 | ~token;
}

// Lists the `k` largest of a row's numbers `at(token)` and those that equal the smallest of them,
// sorted; s.count is their number. `changed(group)` says whether some numbers of a group differ
// from the row's logits. Returns false if there are too many.
template <class At, class Changed>
DEVICE bool list_largest(Shared& s, const Row& row, const At& at, const Changed& changed,
                         uint32_t k) {
    auto group_max = [&](uint32_t i) { return changed(i) ? -INFINITY : row.stats[i].max; };
    uint32_t nothing = ordered(-INFINITY),
             min_key = k < row.groups ? kth_largest(s, group_max, row.groups, k) : nothing;
    if (threadIdx.x == 0) s.count = 0;
    block_sync();
    if (min_key != nothing) {
        for (uint32_t i = threadIdx.x; i < row.groups; i += THREADS) {
            if (!changed(i) && ordered(row.stats[i].max) < min_key) continue;
            for (uint32_t token = i * GROUP; token < (i + 1) * GROUP && token < row.vocabulary;
                 token++) {
                uint32_t key = ordered(at(token));
                if (key >= min_key) list_token(s, key, token);
            }
        }
        block_sync();
    }
    if (min_key == nothing || s.count > LIST) {
        block_sync(); // all threads have read the count
        min_key = kth_largest(s, at, row.vocabulary, k);
        if (threadIdx.x == 0) s.count = 0;
        block_sync();
        for (uint32_t i = threadIdx.x; i < row.vocabulary; i += THREADS) {
            uint32_t key = ordered(at(i));
            if (key >= min_key) list_token(s, key, i);
        }
        block_sync();
    }
    uint32_t count = s.count;
    if (count > LIST) return false;
    // bitonic sort in descending order
    uint32_t size = 1;
    while (size < count) size *= 2;
    for (uint32_t i = count + threadIdx.x; i < size; i += THREADS) s.list[i] = 0;
    block_sync();
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
            block_sync();
        }
    }
    // the list reaches down to a lower bound, which may be less than the k-th largest
    if (threadIdx.x == 0 && count > k) {
        while (s.list[count - 1] >> 32 < s.list[k - 1] >> 32) count--;
        s.count = count;
    }
    block_sync();
    return true;
}

DEVICE float listed_logit(const Shared& s, uint32_t i) {
    return of_ordered(static_cast<uint32_t>(s.list[i] >> 32));
}
DEVICE uint32_t listed_token(const Shared& s, uint32_t i) {
    return ~static_cast<uint32_t>(s.list[i]);
}

// The best of the samples of all threads, returned to thread 0.
DEVICE PartialSample best_of_block(Shared& s, PartialSample best) {
    for (int mask = 16; mask > 0; mask /= 2) best = merge_with_lane(best, mask);
    if (lane_index() == 0) s.best[warp_index()] = best;
    block_sync();
    for (int i = 1; i < WARPS; i++) best = merge(best, s.best[i]);
    return best;
}

// Samples from the row's numbers `at(token)` without a list. Probabilities are counted in units of
// 2^-44 of the largest one.
template <class At>
DEVICE PartialSample sample_unlisted(Shared& s, const At& at, const SamplingJob& c,
                                     uint32_t vocabulary) {
    // takes the memory of the list and of the weights behind it
    unsigned long long (*masses)[256] = reinterpret_cast<unsigned long long (*)[256]>(s.list);
    static_assert(sizeof(s.list) + sizeof(s.weights) == sizeof(unsigned long long) * WARPS * 256,
                  "a histogram for each warp");
    int warp = warp_index(), lane = lane_index();
    uint32_t min_key =
        c.top_k > 0 && c.top_k < vocabulary ? kth_largest(s, at, vocabulary, c.top_k) : 0;
    float max_logit = -INFINITY;
    for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS)
        max_logit = fmaxf(max_logit, at(i));
    max_logit = warp_max(max_logit);
    if (lane == 0) s.partial[warp][0] = max_logit;
    block_sync();
    for (int i = 0; i < WARPS; i++) max_logit = fmaxf(max_logit, s.partial[i][0]);
    auto weight = [&](float x) {
        return exp(static_cast<double>((x - max_logit) * c.inverse_temperature));
    };
    auto mass = [&](float x) {
        return static_cast<unsigned long long>(weight(x) * 17592186044416.0 + 0.5);
    };
    // the last token that takes part of those that tie for the smallest number
    uint32_t last_tie = vocabulary;
    if (c.top_p < 1.0f) {
        for (int shift = 24; shift >= 0; shift -= 8) {
            for (int i = lane; i < 256; i += WARP) masses[warp][i] = 0;
            block_sync();
            for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
                float x = at(i);
                uint32_t key = ordered(x);
                if (key >= min_key && (shift == 24 || key >> (shift + 8) == s.prefix))
                    atomic_add_shared(&masses[warp][key >> shift & 255], mass(x));
            }
            block_sync();
            if (threadIdx.x < 256) {
                unsigned long long sum = 0;
                for (int i = 0; i < WARPS; i++) sum += masses[i][threadIdx.x];
                masses[0][threadIdx.x] = sum;
            }
            block_sync();
            if (threadIdx.x == 0) {
                if (shift == 24) {
                    unsigned long long total = 0;
                    for (int i = 0; i < 256; i++) total += masses[0][i];
                    s.prefix = 0;
                    s.mass =
                        static_cast<unsigned long long>(ceil(c.top_p * static_cast<double>(total)));
                    if (s.mass == 0) s.mass = 1; // the largest always takes part
                }
                unsigned long long left = s.mass;
                int byte = 255;
                while (byte > 0 && masses[0][byte] < left) left -= masses[0][byte--];
                s.mass = left;
                s.prefix = s.prefix << 8 | byte;
            }
            block_sync();
        }
        min_key = s.prefix;
        unsigned long long wanted = s.mass, each = mass(of_ordered(min_key)),
                           all = masses[0][min_key & 255];
        block_sync(); // all threads have read them
        if (wanted + each <= all) {
            uint32_t ties = static_cast<uint32_t>((wanted + each - 1) / each);
            auto number = [&](uint32_t i) {
                return ordered(at(i)) == min_key ? -static_cast<float>(i) : -INFINITY;
            };
            last_tie = static_cast<uint32_t>(-of_ordered(kth_largest(s, number, vocabulary, ties)));
        }
    }
    PartialSample best = no_sample();
    for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
        float x = at(i);
        uint32_t key = ordered(x);
        if (key < min_key || (key == min_key && i > last_tie) ||
            (c.min_p > 0 && weight(x) < c.min_p))
            continue;
        best = merge(best, PartialSample{x * c.inverse_temperature + gumbel(c, i), i, 0, 0, 0});
    }
    return best_of_block(s, best);
}

KERNEL_ALONE(sample_filtered, THREADS)
(SampledToken* out, const float* all_logits, const SoftmaxStats* all_stats, const SamplingJob* jobs,
 const LogitChange* changes, const SampledToken* previous, uint32_t vocabulary) {
    griddep_launch_dependents();
    griddep_wait();
    Shared& s = *reinterpret_cast<Shared*>(shared_memory());
    const SamplingJob& c = jobs[blockIdx.x];
    uint32_t pending = pending_token(c, previous);
    out += c.slot;
    Row row = row_of(all_logits, all_stats, c.row, vocabulary);
    const float* logits = row.logits;
    for (uint32_t i = threadIdx.x; i < (vocabulary + 31) / 32; i += THREADS) s.changed[i] = 0;
    block_sync();
    for (uint32_t i = threadIdx.x; i < c.changes_count; i += THREADS) {
        uint32_t token = changes[c.changes_start + i].token & ~SEEN;
        atomic_or_shared(&s.changed[token / 32], 1u << (token % 32));
    }
    if (threadIdx.x == 0 && pending < vocabulary)
        atomic_or_shared(&s.changed[pending / 32], 1u << (pending % 32));
    float lse = log_sum_exp(s, row); // of the logits as the model gave them
    auto at = [&](uint32_t i) {
        return filtered_logit(logits, s.changed, changes, previous, c, i);
    };
    auto changed = [&](uint32_t group) {
        return (s.changed[group / 2] >> (group % 2 * GROUP) & 0xffff) != 0;
    };
    auto write_sample = [&](const PartialSample& best) {
        if (threadIdx.x == 0) *out = SampledToken{best.token, logits[best.token] - lse};
    };
    bool all = c.top_k == 0 || c.top_k >= vocabulary; // only cut by probability
    uint32_t k = all ? (vocabulary < MAX_LISTED ? vocabulary : MAX_LISTED) : c.top_k;
    if (k > MAX_LISTED || !list_largest(s, row, at, changed, k))
        return write_sample(sample_unlisted(s, at, c, vocabulary));
    uint32_t count = s.count;
    float max_logit = listed_logit(s, 0);
    auto weight = [&](float x) {
        return exp(static_cast<double>((x - max_logit) * c.inverse_temperature));
    };
    if (all && count < vocabulary) {
        // the sum of all weights, added in the order of the threads
        double sum = 0;
        for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) sum += weight(at(i));
        s.weights[threadIdx.x] = sum;
        block_sync();
        if (threadIdx.x == 0) {
            double total = 0;
            for (int i = 0; i < THREADS; i++) total += s.weights[i];
            s.total = total;
        }
        block_sync();
    }
    for (uint32_t i = threadIdx.x; i < count; i += THREADS)
        s.weights[i] = weight(listed_logit(s, i));
    block_sync();
    if (threadIdx.x == 0) {
        double total = 0, before = 0;
        for (uint32_t i = 0; i < count; i++) total += s.weights[i];
        if (all && count < vocabulary) total = s.total;
        uint32_t kept = 0;
        while (kept < count && (kept == 0 || c.top_p >= 1.0f || before < c.top_p * total))
            before += s.weights[kept++];
        // whether tokens beyond the list belong to it as well
        bool unlisted = all && count < vocabulary && kept == count &&
                        (c.top_p >= 1.0f || before < c.top_p * total);
        while (kept > 1 && s.weights[kept - 1] < c.min_p) {
            kept--;
            unlisted = false;
        }
        s.kept = unlisted ? 0 : kept;
    }
    block_sync();
    if (s.kept == 0) return write_sample(sample_unlisted(s, at, c, vocabulary));
    PartialSample best = no_sample();
    for (uint32_t i = threadIdx.x; i < s.kept; i += THREADS) {
        uint32_t token = listed_token(s, i);
        best =
            merge(best, PartialSample{listed_logit(s, i) * c.inverse_temperature + gumbel(c, token),
                                      token, 0, 0, 0});
    }
    write_sample(best_of_block(s, best));
}
EXPORT(sample_filtered)

KERNEL_ALONE(top_logprobs, THREADS)
(SampledToken* out, const float* all_logits, const SoftmaxStats* all_stats, const TopRequest* tops,
 uint32_t max_count, uint32_t vocabulary) {
    griddep_launch_dependents();
    griddep_wait();
    Shared& s = *reinterpret_cast<Shared*>(shared_memory());
    TopRequest top = tops[blockIdx.x];
    Row row = row_of(all_logits, all_stats, top.row, vocabulary);
    float lse = log_sum_exp(s, row);
    bool listed = list_largest(
        s, row, [&](uint32_t i) { return row.logits[i]; }, [](uint32_t) { return false; },
        top.count);
    for (uint32_t i = threadIdx.x; i < max_count; i += THREADS) {
        SampledToken c = {TOO_MANY, 0};
        if (listed && i < top.count) c = SampledToken{listed_token(s, i), listed_logit(s, i) - lse};
        out[static_cast<size_t>(blockIdx.x) * max_count + i] = c;
    }
}
EXPORT(top_logprobs)
