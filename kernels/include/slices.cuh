// Products of tiles whose operands the copy engine brings, slice by slice of the inputs, through a ring in shared memory.
#pragma once
#include "warpgroup.cuh"

#if HOPPER

// A ring of STAGES slices of 64 inputs: of TOKENS rows of x, then of OUTPUTS rows of W. One thread claims stages and fills them, whole
// warpgroups multiply. Each goes over the same slices in the same order and counts them as `turn`. At the start of shared memory.
template <int TOKENS, int OUTPUTS, int STAGES>
struct Slices {
    static constexpr int WIDTH = 64;
    static constexpr int X_BYTES = TOKENS * WIDTH * 2, STAGE_BYTES = X_BYTES + OUTPUTS * WIDTH * 2;
    static constexpr int BARRIERS_AT = STAGES * STAGE_BYTES, BYTES = BARRIERS_AT + 2 * STAGES * 8;
    char* shared;
    uint64_t *full, *empty;

    // By all threads; `consumers`: warps that multiply.
    DEVICE_MEMBER Slices(char* shared, uint32_t consumers)
        : shared(shared), full(reinterpret_cast<uint64_t*>(shared + BARRIERS_AT)), empty(full + STAGES) {
        init_stages(full, empty, STAGES, consumers);
    }
    DEVICE_MEMBER char* stage(uint32_t turn) const { return shared + turn % STAGES * STAGE_BYTES; }

    // Waits until the stage is free; its bytes are to come.
    DEVICE_MEMBER void claim(uint32_t turn) const {
        barrier_wait(&empty[turn % STAGES], (turn / STAGES + 1) & 1);
        barrier_arrive_expecting(&full[turn % STAGES], STAGE_BYTES);
    }
    DEVICE_MEMBER void bring_x(uint32_t turn, const TensorMap* x, uint32_t first_token, uint32_t slice) const {
        copy_tile(stage(turn), x, first_token, slice * WIDTH, &full[turn % STAGES]);
    }
    DEVICE_MEMBER void bring_w(uint32_t turn, const TensorMap* w, uint32_t first_output, uint32_t slice) const {
        copy_tile(stage(turn) + X_BYTES, w, first_output, slice * WIDTH, &full[turn % STAGES]);
    }

    // d = the sums over so many slices of 64 tokens from `token` on with N outputs from `output` on, both of the tile. The products of a
    // slice are begun before the last one's are waited for. `d` as `multiply_group` leaves it.
    template <class T, int N>
    DEVICE_MEMBER void multiply(float (&d)[N / 2], uint32_t& turn, uint32_t slices, int token, int output) const {
        UNROLL
        for (int i = 0; i < N / 2; i++) d[i] = 0;
        int lane = lane_index();
        for (uint32_t s = 0; s < slices; s++, turn++) {
            const char* from = stage(turn);
            barrier_wait(&full[turn % STAGES], turn / STAGES & 1);
            products_begin();
            UNROLL
            for (int k = 0; k < WIDTH; k += 16) {
                multiply_group<T, N>(d, operand(from + token * WIDTH * 2, k), operand(from + X_BYTES + output * WIDTH * 2, k));
            }
            products_commit();
            products_wait<1>();
            if (s > 0 && lane == 0) barrier_arrive(&empty[(turn - 1) % STAGES]); // the slice before is done
        }
        products_wait<0>();
        products_arrived(d);
        if (slices > 0 && lane == 0) barrier_arrive(&empty[(turn - 1) % STAGES]);
    }
};

#endif // HOPPER
