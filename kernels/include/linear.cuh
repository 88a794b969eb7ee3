// What several kernels of linear layers share.
#pragma once
#include "layer_norm.cuh"

// How the 16 bytes of weights that a lane loads become operands of mma_m16n8k16: in STEPS
// instructions, each of which takes 4 of the lane's inputs.
template <class T, class W>
struct Weights {
    static constexpr int STEPS = 2;
    static DEVICE_MEMBER void operand(uint32_t (&b)[2], const Pack16B& w, int step) {
        b[0] = w.pairs[2 * step];
        b[1] = w.pairs[2 * step + 1];
    }
};
template <class T>
struct Weights<T, int8_t> {
    static constexpr int STEPS = 4;
    static DEVICE_MEMBER void operand(uint32_t (&b)[2], const Pack16B& w, int step) {
        uint32_t v = w.pairs[step];
        // integers up to 127 are exact in both 16-bit types
        b[0] = pack<T>(float_of_byte<0>(v), float_of_byte<1>(v));
        b[1] = pack<T>(float_of_byte<2>(v), float_of_byte<3>(v));
    }
};

// Normalizes all tokens into rows of `stride` elements in shared memory, by a block of WARPS warps.
template <class T, int WARPS>
DEVICE void stage_normalized(const LinearArgs& in, T* rows, uint32_t stride) {
    for (uint32_t token = warp_index(); token < in.tokens; token += WARPS) {
        FloatRow row = {static_cast<const float*>(in.x) + static_cast<size_t>(token) * in.inputs};
        normalize(row, in.weight, in.bias, in.inputs, in.eps, [&](uint32_t i, Float4 v) {
            store_four(rows + static_cast<size_t>(token) * stride + i, v);
            if (in.normed && blockIdx.x == 0) {
                store_four(static_cast<T*>(in.normed) + static_cast<size_t>(token) * in.inputs + i,
                           v);
            }
        });
    }
    block_sync();
}
