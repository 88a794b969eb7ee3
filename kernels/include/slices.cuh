// Products of tiles whose operands the copy engine brings, slice by slice of the inputs, through a
// ring in shared memory.
#pragma once
#include "cluster.cuh"
#include "warpgroup.cuh"

#if HOPPER

// A ring of STAGES slices of 64 inputs: of TOKENS rows of x, then of OUTPUTS rows of W. One thread
// claims stages and fills them, whole warpgroups multiply. Each goes over the same slices in the
// same order and counts them as `turn`. At the start of shared memory. If W is SHARED, the blocks
// of a cluster (one or two) have tiles of the same outputs: each brings a part of W's rows to all
// of them.
template <int TOKENS, int OUTPUTS, int STAGES, bool SHARED = false>
struct Slices {
    static constexpr int WIDTH = 64;
    static constexpr int X_BYTES = TOKENS * WIDTH * 2, STAGE_BYTES = X_BYTES + OUTPUTS * WIDTH * 2;
    static constexpr int BARRIERS_AT = STAGES * STAGE_BYTES, BYTES = BARRIERS_AT + 2 * STAGES * 8;
    static constexpr int PART = OUTPUTS / 2; // rows of a copy of W that is shared
    char* shared;
    uint64_t *full, *empty;
    uint32_t blocks, rank; // of the cluster that shares W

    // By all threads; `consumers`: warps of a block that multiply.
    DEVICE_MEMBER Slices(char* shared, uint32_t consumers)
        : shared(shared), full(reinterpret_cast<uint64_t*>(shared + BARRIERS_AT)),
          empty(full + STAGES) {
        blocks = SHARED ? cluster_size() : 1;
        rank = SHARED ? cluster_rank() : 0;
        init_stages(full, empty, STAGES, consumers * blocks);
        if constexpr (SHARED) sync_cluster(); // all have barriers
    }
    DEVICE_MEMBER char* stage(uint32_t turn) const { return shared + turn % STAGES * STAGE_BYTES; }

    // Waits until the stage is free; its bytes are to come.
    DEVICE_MEMBER void claim(uint32_t turn) const {
        barrier_wait(&empty[turn % STAGES], (turn / STAGES + 1) & 1);
        barrier_arrive_expecting(&full[turn % STAGES], STAGE_BYTES);
    }
    DEVICE_MEMBER void bring_x(uint32_t turn, const TensorMap* x, uint32_t first_token,
                               uint32_t slice) const {
        copy_tile(stage(turn), x, first_token, slice * WIDTH, &full[turn % STAGES]);
    }
    // Tiles of `w` have OUTPUTS rows, or PART if it is shared.
    DEVICE_MEMBER void bring_w(uint32_t turn, const TensorMap* w, uint32_t first_output,
                               uint32_t slice) const {
        char* to = stage(turn) + X_BYTES;
        if constexpr (SHARED) {
            for (uint32_t row = rank * PART; row < OUTPUTS; row += blocks * PART) {
                copy_tile_to((1 << blocks) - 1, to + row * WIDTH * 2, w, first_output + row,
                             slice * WIDTH, &full[turn % STAGES]);
            }
        } else {
            copy_tile(to, w, first_output, slice * WIDTH, &full[turn % STAGES]);
        }
    }
    // By whole warps that have multiplied a slice: whoever brings the next one need not wait for
    // them.
    DEVICE_MEMBER void release(uint32_t turn) const {
        uint32_t lane = lane_index();
        if constexpr (SHARED) {
            if (lane < blocks) barrier_arrive_in(&empty[turn % STAGES], lane);
        } else {
            if (lane == 0) barrier_arrive(&empty[turn % STAGES]);
        }
    }

    // d = the sums over so many slices of 64 tokens from `token` on with N outputs from `output`
    // on, both of the tile. The products of a slice are begun before the last one's are waited for.
    // `d` as `multiply_group` leaves it.
    template <class T, int N>
    DEVICE_MEMBER void multiply(float (&d)[N / 2], uint32_t& turn, uint32_t slices, int token,
                                int output) const {
        UNROLL
        for (int i = 0; i < N / 2; i++) d[i] = 0;
        for (uint32_t s = 0; s < slices; s++, turn++) {
            const char* from = stage(turn);
            barrier_wait(&full[turn % STAGES], turn / STAGES & 1);
            products_begin();
            UNROLL
            for (int k = 0; k < WIDTH; k += 16) {
                multiply_group<T, N>(d, operand(from + token * WIDTH * 2, k),
                                     operand(from + X_BYTES + output * WIDTH * 2, k));
            }
            products_commit();
            products_wait<1>();
            if (s > 0) release(turn - 1);
        }
        products_wait<0>();
        products_arrived(d);
        if (slices > 0) release(turn - 1);
    }
};

#endif // HOPPER
