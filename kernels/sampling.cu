// The last step of choosing tokens: one block for each choice reduces what the head's blocks left.
//
//   partials [choice, block] -> chosen [choice] = (token, log-probability)
//
// Least bytes: the partials, 20 for every 16 products of the head (0.04 % of the weights that those
// read at width 1536, for each token), or for every 128 where larger tiles chose.
#include "choice.cuh"
#include "memory.cuh"

constexpr int THREADS = 256;

KERNEL(merge_choices, THREADS)(Choices choices, Chosen* out) {
    wait_for_earlier_kernels();
    const Partial* partials = choices.partials + static_cast<size_t>(blockIdx.x) * choices.blocks;
    Partial p = nothing();
    for (uint32_t i = threadIdx.x; i < choices.blocks; i += THREADS) p = merged(p, partials[i]);
    for (int mask = 16; mask > 0; mask /= 2) p = merged_with_lane(p, mask);
    Partial* warps = reinterpret_cast<Partial*>(shared_memory());
    if (lane_index() == 0) warps[warp_index()] = p;
    sync_block();
    if (threadIdx.x == 0) {
        for (int i = 1; i < THREADS / WARP; i++) p = merged(p, warps[i]);
        out[choices.list[blockIdx.x].slot] = Chosen{p.token, p.logit - (p.most + logf(p.sum))};
    }
}
EXPORT(merge_choices)
