// A pipeline of TMA copies through shared memory, and the GEMM main loop that consumes it.
#pragma once
#include "cluster.cuh"
#include "wgmma.cuh"

#if HOPPER

// A ring of STAGES stages. A stage holds a slice of 64 inputs: of TOKENS rows of x, then of OUTPUTS
// rows of W. One thread is the producer, whole warpgroups are consumers. All of them go through the
// same slices in the same order and count them in `iteration`. The ring lies at the start of shared
// memory. If W is SHARED, the blocks of a cluster (one or two) work on the same outputs, and each
// loads a part of W's rows and multicasts it to all of them.
// X_TRANS and W_TRANS: the operand lies transposed in memory, [inputs, tokens] or [inputs,
// outputs], and comes in tiles of 64 inputs by 64 tokens or outputs, which the tensor cores
// transpose.
template <int TOKENS, int OUTPUTS, int STAGES, bool SHARED = false, bool X_TRANS = false,
          bool W_TRANS = false>
struct TmaPipeline {
    static constexpr int WIDTH = LINEAR_SLICE;
    static constexpr int X_BYTES = TOKENS * WIDTH * 2, STAGE_BYTES = X_BYTES + OUTPUTS * WIDTH * 2;
    static constexpr int BARRIERS_AT = STAGES * STAGE_BYTES, BYTES = BARRIERS_AT + 2 * STAGES * 8;
    static constexpr int PART = OUTPUTS / 2;             // outputs that one block multicasts
    static constexpr int TILE_BYTES = WIDTH * WIDTH * 2; // of 64 by 64
    char* shared;
    uint64_t *full, *empty;
    uint32_t blocks, rank; // blocks of the cluster that shares W, and which of them this is

    // All threads call it. `consumers` is the number of consuming warps in a block.
    DEVICE_MEMBER TmaPipeline(char* shared, uint32_t consumers)
        : shared(shared), full(reinterpret_cast<uint64_t*>(shared + BARRIERS_AT)),
          empty(full + STAGES) {
        blocks = SHARED ? cluster_size() : 1;
        rank = SHARED ? cluster_rank() : 0;
        init_pipeline_stages(full, empty, STAGES, consumers * blocks);
        if constexpr (SHARED) cluster_sync(); // the mbarriers of all blocks are initialized
    }
    DEVICE_MEMBER char* stage(uint32_t iteration) const {
        return shared + iteration % STAGES * STAGE_BYTES;
    }

    // Waits until the stage is empty, and announces the bytes that will be loaded into it.
    DEVICE_MEMBER void producer_acquire(uint32_t iteration) const {
        mbarrier_wait_parity(&empty[iteration % STAGES], (iteration / STAGES + 1) & 1);
        mbarrier_arrive_expect_tx(&full[iteration % STAGES], STAGE_BYTES);
    }
    DEVICE_MEMBER void load_x(uint32_t iteration, const TensorMap* x, uint32_t first_token,
                              uint32_t slice) const {
        uint64_t* barrier = &full[iteration % STAGES];
        if constexpr (X_TRANS) {
            UNROLL
            for (int i = 0; i < TOKENS / WIDTH; i++) {
                tma_load(stage(iteration) + i * TILE_BYTES, x, slice * WIDTH,
                         first_token + i * WIDTH, barrier);
            }
        } else {
            tma_load(stage(iteration), x, first_token, slice * WIDTH, barrier);
        }
    }
    // The tensor map of W has boxes of OUTPUTS rows, or of PART rows if W is shared; if it is
    // transposed, of 64 rows, and W is shared.
    DEVICE_MEMBER void load_w(uint32_t iteration, const TensorMap* w, uint32_t first_output,
                              uint32_t slice) const {
        char* to = stage(iteration) + X_BYTES;
        if constexpr (SHARED && W_TRANS) {
            for (uint32_t part = rank * PART; part < OUTPUTS; part += blocks * PART) {
                UNROLL
                for (uint32_t i = part; i < part + PART; i += WIDTH) {
                    tma_load_multicast((1 << blocks) - 1, to + i * WIDTH * 2, w, slice * WIDTH,
                                       first_output + i, &full[iteration % STAGES]);
                }
            }
        } else if constexpr (SHARED) {
            for (uint32_t row = rank * PART; row < OUTPUTS; row += blocks * PART) {
                tma_load_multicast((1 << blocks) - 1, to + row * WIDTH * 2, w, first_output + row,
                                   slice * WIDTH, &full[iteration % STAGES]);
            }
        } else {
            tma_load(to, w, first_output, slice * WIDTH, &full[iteration % STAGES]);
        }
    }
    // Tells the producers, by whole warps, that this warp has read the stage.
    DEVICE_MEMBER void consumer_release(uint32_t iteration) const {
        uint32_t lane = lane_index();
        if constexpr (SHARED) {
            if (lane < blocks) mbarrier_arrive_cluster(&empty[iteration % STAGES], lane);
        } else {
            if (lane == 0) mbarrier_arrive(&empty[iteration % STAGES]);
        }
    }

    // The operands of a stage from inner element `k` on: x from token `token`, a multiple of 64,
    // and W from output `output` on.
    DEVICE_MEMBER static uint64_t x_operand(const char* stage, int token, int k) {
        const char* from = stage + token * WIDTH * 2;
        if constexpr (X_TRANS) return wgmma_descriptor_transposed(from, k, TILE_BYTES);
        return wgmma_descriptor(from, k);
    }
    DEVICE_MEMBER static uint64_t w_operand(const char* stage, int output, int k) {
        const char* from = stage + X_BYTES + output * WIDTH * 2;
        if constexpr (W_TRANS) return wgmma_descriptor_transposed(from, k, TILE_BYTES);
        return wgmma_descriptor(from, k);
    }

    // Adds the products of slices `begin` to `end` of a tile to d, for 64 tokens of the tile from
    // `token` on and N outputs from `output` on. The wgmma of a slice are issued before those of
    // the previous one are waited for, and those of the last one are not waited for at all. The
    // accumulators are ordered as by wgmma_ss. If there are `sums`, the products of x and `ones`, 8
    // rows of 64 ones, are added to them.
    template <class T, int N, class... Sums>
    DEVICE_MEMBER void add_slices(float (&d)[N / 2], uint32_t& iteration, uint32_t begin,
                                  uint32_t end, int token, int output, Sums&... sums) const {
        for (uint32_t s = begin; s < end; s++, iteration++) {
            const char* from = stage(iteration);
            mbarrier_wait_parity(&full[iteration % STAGES], iteration / STAGES & 1);
            wgmma_fence();
            UNROLL
            for (int k = 0; k < WIDTH; k += 16) {
                wgmma_ss<T, N, X_TRANS, W_TRANS>(d, x_operand(from, token, k),
                                                 w_operand(from, output, k));
                if constexpr (sizeof...(Sums) > 0)
                    add_inputs<T>(x_operand(from, token, k), sums...);
            }
            wgmma_commit_group();
            wgmma_wait_group<1>();
            if (s > 0) consumer_release(iteration - 1);
        }
    }
    template <class T>
    DEVICE_MEMBER static void add_inputs(uint64_t x, float (&sums)[4], const char* ones) {
        wgmma_ss<T, 8, X_TRANS, false>(sums, x, wgmma_descriptor(ones, 0));
    }
    // Waits for the last of a tile's slices.
    template <int SUMS>
    DEVICE_MEMBER void finish_slices(float (&d)[SUMS], uint32_t iteration, uint32_t slices) const {
        wgmma_wait_group<0>();
        wgmma_fence_operand(d);
        if (slices > 0) consumer_release(iteration - 1);
    }
    // Computes d = x W^T over `slices` slices.
    template <class T, int N>
    DEVICE_MEMBER void mainloop(float (&d)[N / 2], uint32_t& iteration, uint32_t slices, int token,
                                int output) const {
        UNROLL
        for (int i = 0; i < N / 2; i++) d[i] = 0;
        add_slices<T, N>(d, iteration, 0, slices, token, output);
        finish_slices(d, iteration, slices);
    }
};

#endif // HOPPER
