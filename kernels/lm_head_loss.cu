// The loss at the LM head: what is known of a chunk of logits, and their gradients in the same
// place.
//
//   logits [rows, stride] in 16 bits, of which `vocabulary` count
//
// A loss is a function of each label's log-probability l and, if it likes, of the entropy H of its
// row. With g = d loss / d l and h = d loss / d H, the gradient of logit j is
//   g * ([j = target] - p_j) - h * p_j * (log p_j + H)
// for any loss: cross-entropy has g = -scale and h = 0. So there is one kernel for statistics, one
// for gradients, and a small one for each loss between them.
// All are limited by memory: logits are read twice and written once.
#include "block_sum.cuh"
#include "memory.cuh"

// Softmax statistics of some logits: the maximum, and relative to it the sum of the exponentials
// and the sum of logits times exponentials.
struct LogitStats {
    float max = -INFINITY, sum = 0, dot = 0;
    DEVICE_MEMBER void rescale(float to) {
        float factor = max == -INFINITY ? 0.0f : expf(max - to);
        sum *= factor;
        dot *= factor;
        max = to;
    }
    DEVICE_MEMBER void add(const LogitStats& other) {
        if (other.max == -INFINITY) return;
        LogitStats o = other;
        if (o.max > max) {
            rescale(o.max);
        } else {
            o.rescale(max);
        }
        sum += o.sum;
        dot += o.dot;
    }
};

// Log-sum-exp, entropy and the target's log-probability of a row, by one block.
KERNEL(logit_stats_bf16, TRAIN_THREADS)(LogitRows a) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t row = blockIdx.x;
    const bf16* logits = static_cast<const bf16*>(a.logits) + static_cast<size_t>(row) * a.stride;
    LogitStats stats;
    for (uint32_t first = threadIdx.x * 8; first < a.vocabulary; first += TRAIN_THREADS * 8) {
        Pack16B eight = load_streaming(reinterpret_cast<const Pack16B*>(logits + first));
        float z[8], max = -INFINITY;
        UNROLL
        for (int j = 0; j < 8; j++) {
            uint32_t pair = eight.pairs[j / 2];
            z[j] = j % 2 ? high<bf16>(pair) : low<bf16>(pair);
            if (first + j >= a.vocabulary) z[j] = -INFINITY;
            max = fmaxf(max, z[j]);
        }
        if (max > stats.max) stats.rescale(max);
        UNROLL
        for (int j = 0; j < 8; j++) {
            if (first + j >= a.vocabulary) continue;
            float e = expf(z[j] - stats.max);
            stats.sum += e;
            stats.dot += e * z[j];
        }
    }
    LogitStats* all = reinterpret_cast<LogitStats*>(shared_memory());
    all[threadIdx.x] = stats;
    block_sync();
    for (uint32_t half = TRAIN_THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) all[threadIdx.x].add(all[threadIdx.x + half]);
        block_sync();
    }
    if (threadIdx.x > 0) return;
    float lse = all[0].max + logf(all[0].sum);
    a.lse[row] = lse;
    a.entropies[row] = lse - all[0].dot / all[0].sum;
    a.log_probs[row] = to_float(logits[a.targets[row]]) - lse;
}
EXPORT(logit_stats_bf16)

// Cross-entropy of a chunk: its sum is added to that of the step, and the gradient of each label's
// log-probability is -scale. One block.
KERNEL(cross_entropy, TRAIN_THREADS)
(TrainSums* sums, float* gradients, const float* log_probs, uint32_t rows, float scale) {
    griddep_launch_dependents();
    griddep_wait();
    double loss = 0;
    for (uint32_t i = threadIdx.x; i < rows; i += TRAIN_THREADS) {
        loss -= static_cast<double>(log_probs[i]);
        gradients[i] = -scale;
    }
    loss = block_sum<TRAIN_THREADS>(loss);
    if (threadIdx.x == 0) sums->loss += loss;
}
EXPORT(cross_entropy)

// What is no finite number stays so: it comes of log-probabilities that are none.
DEVICE float clamp_log_ratio(float x) {
    constexpr float MAX = MAX_LOG_RATIO;
    if (fabsf(x) == INFINITY) return x;
    return x > MAX ? MAX : x < -MAX ? -MAX : x;
}

// The clipped surrogate of PPO of a chunk, with a penalty for moving away from a reference and a
// bonus for entropy: its sum is added to that of the step, and each label gets its gradients. One
// block.
KERNEL(clipped_ppo, TRAIN_THREADS)(ClippedPpoArgs a) {
    griddep_launch_dependents();
    griddep_wait();
    double loss = 0;
    for (uint32_t i = threadIdx.x; i < a.labels; i += TRAIN_THREADS) {
        float log_prob = a.log_probs[i], advantage = a.advantages[i];
        float moved = log_prob - a.old_log_probs[i], log_ratio = clamp_log_ratio(moved);
        float ratio = expf(log_ratio), plain = ratio * advantage;
        float clipped = fminf(fmaxf(ratio, 1 - a.clip), 1 + a.clip) * advantage;
        // a ratio that is no number makes the loss none, so that the step is not taken
        bool is_clipped = clipped < plain;
        float term = is_clipped ? -clipped : -plain;
        float g = is_clipped || log_ratio != moved ? 0 : -plain;
        if (a.reference_log_probs) {
            moved = log_prob - a.reference_log_probs[i];
            log_ratio = clamp_log_ratio(moved);
            float inverse = expm1f(-log_ratio);
            term += a.kl * (inverse + log_ratio);
            if (log_ratio == moved) g -= a.kl * inverse;
        }
        term -= a.entropy * a.entropies[i];
        loss += static_cast<double>(term);
        a.log_prob_gradients[i] = a.scale * g;
        a.entropy_gradients[i] = -a.scale * a.entropy;
    }
    loss = block_sum<TRAIN_THREADS>(loss);
    if (threadIdx.x == 0) a.sums->loss += loss;
}
EXPORT(clipped_ppo)

// Logits become their gradients; those beyond the vocabulary, zeros. `log_prob_gradients` [row] and
// `entropy_gradients` [row], or null for none, are those of the loss.
KERNEL(logit_gradients_bf16, TRAIN_THREADS)
(LogitRows a, const float* log_prob_gradients, const float* entropy_gradients) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t row = blockIdx.y, first = (blockIdx.x * TRAIN_THREADS + threadIdx.x) * 8;
    if (first >= a.stride) return;
    bf16* logits = static_cast<bf16*>(a.logits) + static_cast<size_t>(row) * a.stride + first;
    float g = log_prob_gradients[row], h = entropy_gradients ? entropy_gradients[row] : 0;
    float lse = a.lse[row], entropy = a.entropies[row];
    uint32_t target = a.targets[row] - first; // among these eight if below 8
    Pack16B eight = *reinterpret_cast<const Pack16B*>(logits);
    UNROLL
    for (uint32_t j = 0; j < 8; j += 2) {
        float d[2];
        UNROLL
        for (uint32_t k = 0; k < 2; k++) {
            float log_p =
                (k ? high<bf16>(eight.pairs[j / 2]) : low<bf16>(eight.pairs[j / 2])) - lse;
            float p = expf(log_p);
            d[k] = g * ((j + k == target ? 1.0f : 0.0f) - p) - h * p * (log_p + entropy);
            if (first + j + k >= a.vocabulary) d[k] = 0;
        }
        eight.pairs[j / 2] = pack<bf16>(d[0], d[1]);
    }
    *reinterpret_cast<Pack16B*>(logits) = eight;
}
EXPORT(logit_gradients_bf16)
