// Choosing a token by rank and probability (top-k, then top-p, then min-p), exactly, from logits in memory.
//
//   logits [row, vocabulary] in f32 -> chosen [choice] = (token, log-probability)
//
// Least bytes: the row once; it is read six times, the later ones from the second-level cache (a row of 250,880 is 1 MB).
// One block for each choice: a radix selection in four passes finds the k-th largest logit; what is not smaller (ties stay, as in
// transformers) goes to a list in shared memory, is sorted by logit and token, cut by probability, and chosen from by
// Gumbel-max. Probabilities are added in f64, in the sorted order, as on the CPU. A list that ties make too long for
// shared memory is left to the host: its token is TOO_MANY.
#include "choice.cuh"
#include "memory.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int LIST = 2048; // at most half of it is asked for; the rest is room for ties
constexpr uint32_t TOO_MANY = 0xfffffffe;

// Keeps the order of floats in unsigned integers.
DEVICE uint32_t ordered(float x) {
    uint32_t bits = bits_of_float(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float of_ordered(uint32_t key) { return float_of_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

struct Shared {
    unsigned long long list[LIST]; // ordered logit, then the complement of the token
    double weights[LIST];
    uint32_t histograms[WARPS][256];
    float partial[WARPS][2];
    Partial best[WARPS];
    uint32_t count, prefix, left, kept;
    uint32_t changed[1]; // a bit for each token, to the end of shared memory
};

DEVICE float filtered_logit(const float* logits, const uint32_t* bits, const Change* changes, const Choice& c, uint32_t token) {
    float x = logits[token];
    return bits[token / 32] >> (token % 32) & 1 ? changed(x, changes, c, token) : x;
}

KERNEL_ALONE(choose_filtered, THREADS)
(Chosen* out, const float* all_logits, const Choice* choices, const Change* changes, uint32_t vocabulary) {
    wait_for_earlier_kernels();
    Shared& s = *reinterpret_cast<Shared*>(shared_memory());
    const Choice& c = choices[blockIdx.x];
    const float* logits = all_logits + static_cast<size_t>(c.row) * vocabulary;
    int warp = warp_index(), lane = lane_index();
    for (uint32_t i = threadIdx.x; i < (vocabulary + 31) / 32; i += THREADS) s.changed[i] = 0;
    if (threadIdx.x == 0) {
        s.count = 0;
        s.prefix = 0;
        s.left = c.top_k;
    }
    sync_block();
    for (uint32_t i = threadIdx.x; i < c.changes_count; i += THREADS) {
        uint32_t token = changes[c.changes_start + i].token & ~SEEN;
        set_bits_shared(&s.changed[token / 32], 1u << (token % 32));
    }
    // log-sum-exp of the model's own logits
    float most = -INFINITY;
    for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) most = fmaxf(most, logits[i]);
    most = warp_max(most);
    if (lane == 0) s.partial[warp][0] = most;
    sync_block();
    for (int i = 0; i < WARPS; i++) most = fmaxf(most, s.partial[i][0]);
    float sum = 0;
    for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) sum += expf(logits[i] - most);
    sum = warp_sum(sum);
    if (lane == 0) s.partial[warp][1] = sum;
    // the k-th largest: one byte of it at a time, from the top
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = lane; i < 256; i += WARP) s.histograms[warp][i] = 0;
        sync_block();
        for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
            uint32_t key = ordered(filtered_logit(logits, s.changed, changes, c, i));
            if (shift == 24 || key >> (shift + 8) == s.prefix) add_shared(&s.histograms[warp][key >> shift & 255], 1);
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
    uint32_t least = s.prefix;
    for (uint32_t i = threadIdx.x; i < vocabulary; i += THREADS) {
        uint32_t key = ordered(filtered_logit(logits, s.changed, changes, c, i));
        if (key >= least) {
            uint32_t at = add_shared(&s.count, 1);
            if (at < LIST) s.list[at] = static_cast<unsigned long long>(key) << 32 | ~i;
        }
    }
    sync_block();
    uint32_t count = s.count;
    if (count > LIST) {
        if (threadIdx.x == 0) out[blockIdx.x] = Chosen{TOO_MANY, 0};
        return;
    }
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
    float largest = of_ordered(static_cast<uint32_t>(s.list[0] >> 32));
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        float x = of_ordered(static_cast<uint32_t>(s.list[i] >> 32));
        s.weights[i] = exp(static_cast<double>((x - largest) * c.inverse_temperature));
    }
    sync_block();
    if (threadIdx.x == 0) {
        double total = 0, before = 0;
        for (uint32_t i = 0; i < count; i++) total += s.weights[i];
        uint32_t kept = 0;
        while (kept < count && (kept == 0 || c.top_p >= 1.0f || before < c.top_p * total)) before += s.weights[kept++];
        while (kept > 1 && s.weights[kept - 1] < c.min_p) kept--;
        s.kept = kept;
    }
    sync_block();
    Partial best = nothing();
    for (uint32_t i = threadIdx.x; i < s.kept; i += THREADS) {
        uint32_t token = ~static_cast<uint32_t>(s.list[i]);
        float x = of_ordered(static_cast<uint32_t>(s.list[i] >> 32));
        best = merged(best, Partial{x * c.inverse_temperature + gumbel(c, token), token, 0, 0, 0});
    }
    for (int mask = 16; mask > 0; mask /= 2) best = merged_with_lane(best, mask);
    if (lane == 0) s.best[warp] = best;
    sync_block();
    if (threadIdx.x == 0) {
        float total = s.partial[0][1];
        for (int i = 1; i < WARPS; i++) {
            best = merged(best, s.best[i]);
            total += s.partial[i][1];
        }
        out[blockIdx.x] = Chosen{best.token, logits[best.token] - (most + logf(total))};
    }
}
EXPORT(choose_filtered)
