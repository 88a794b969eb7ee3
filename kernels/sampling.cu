// The last step of sampling: one block for each job reduces the partial samples of the LM head's
// blocks.
//
//   partials [job, block] -> out [job] = (token, log-probability)
//
// Least bytes: the partial samples, 20 bytes for every 16 logits (0.04 % of the weights that these
// read at width 1536, for each token), or for every 128 where the LM head uses larger tiles.
#include "memory.cuh"
#include "sampling.cuh"

constexpr int THREADS = MERGE_THREADS;

KERNEL(merge_samples, THREADS)(SamplingArgs args, SampledToken* out) {
    griddep_launch_dependents();
    griddep_wait();
    const PartialSample* partials = args.partials + static_cast<size_t>(blockIdx.x) * args.blocks;
    PartialSample p = no_sample();
    for (uint32_t i = threadIdx.x; i < args.blocks; i += THREADS) p = merge(p, partials[i]);
    for (int mask = 16; mask > 0; mask /= 2) p = merge_with_lane(p, mask);
    PartialSample* warps = reinterpret_cast<PartialSample*>(shared_memory());
    if (lane_index() == 0) warps[warp_index()] = p;
    block_sync();
    if (threadIdx.x == 0) {
        for (int i = 1; i < THREADS / WARP; i++) p = merge(p, warps[i]);
        out[args.jobs[blockIdx.x].slot] =
            SampledToken{p.token, p.logit - (p.max + logf(p.sum_exp))};
    }
}
EXPORT(merge_samples)
