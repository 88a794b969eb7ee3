// y = epilogue(x W^T) for many tokens on Hopper: copies by the copy engine, products by warpgroups.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//
// FLOPs: 2 * tokens * inputs * outputs. A block has a tile of 128 tokens by 256 outputs; two blocks of a cluster have the same outputs, and each
// brings half of the weights to both: (128 + 128) * inputs elements from the second-level cache for 128 * 256 outputs, 128 FLOPs a
// byte (85 without clusters, where there is one tile of tokens). One block fills a multiprocessor and takes tile after tile, in groups of
// 16 tiles of tokens, so that what is worked on at a time reads few rows of either operand from memory. One thread of the first warpgroup
// asks for slices of 64 inputs, four ahead; the other two warpgroups multiply 64 tokens by 256 outputs each, straight from
// shared memory, with the next slice's products begun before the last one's are waited for. A pair of barrier objects for
// each stage says when it is full and when it is free, in both blocks. Results in 16 bits go through shared memory, 64 columns at a
// time, so that whole lines are written.
#include "epilogue.cuh"
#include "linear.cuh"
#include "memory.cuh"
#include "slices.cuh"
#include "tensor_core.cuh"

#if HOPPER

constexpr int TILE_M = 128, TILE_N = 256;
constexpr int CONSUMERS = 2;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
using Ring = Slices<TILE_M, TILE_N, 4, true>;
constexpr uint32_t GROUP = 16; // tiles of tokens whose tiles of outputs are taken together

constexpr int STAGED_COLUMNS = 64, STAGED_STRIDE = STAGED_COLUMNS * 2 + 16; // rows meet no bank twice

// Writes a warp's 16 tokens by 256 outputs in 16 bits. `d` as `multiply_group` leaves it; `staged`: the warp's own, 16 rows.
template <class T>
DEVICE void finish_narrow(const Epilogue& e, char* staged, uint32_t first_token, uint32_t tokens, uint32_t first_row,
                          const float (&d)[TILE_N / 2]) {
    constexpr int PIECES = STAGED_COLUMNS / 8; // of 16 bytes
    int lane = lane_index(), t = lane % 4;
    UNROLL
    for (int part = 0; part < TILE_N / STAGED_COLUMNS; part++) {
        UNROLL
        for (int j = 0; j < PIECES; j += 2) {
            uint32_t four[4];
            UNROLL
            for (int i = 0; i < 4; i++) {
                int column = part * STAGED_COLUMNS + (j + i / 2) * 8;
                uint32_t row = first_row + column + 2 * t;
                float bias[2] = {row < e.width ? e.bias[row] : 0, row < e.width ? e.bias[row + 1] : 0};
                float a = d[column / 2 + i % 2 * 2] + bias[0], b = d[column / 2 + i % 2 * 2 + 1] + bias[1];
                four[i] = e.mode == GELU ? pack<T>(gelu(a), gelu(b)) : pack<T>(a, b);
            }
            store_matrices(staged + (lane / 8 % 2 * 8 + lane % 8) * STAGED_STRIDE + (j + lane / 16) * 16, four);
        }
        sync_warp();
        UNROLL
        for (int i = lane; i < 16 * PIECES; i += WARP) {
            uint32_t token = first_token + i / PIECES, row = first_row + part * STAGED_COLUMNS + i % PIECES * 8;
            if (token < tokens && row < e.width) {
                *reinterpret_cast<Eight*>(narrow_place<T>(e, token, row)) =
                    load(reinterpret_cast<const Eight*>(staged + i / PIECES * STAGED_STRIDE + i % PIECES * 16));
            }
        }
        sync_warp();
    }
}

// Shared memory: the ring, then what `finish_narrow` needs for each consuming warp.
template <class T>
DEVICE void linear_hopper(const TensorMap* x, const TensorMap* w, uint32_t tokens, uint32_t inputs, const Epilogue& e) {
    char* shared = shared_memory();
    Ring ring(shared, CONSUMERS * WARPGROUP / WARP);
    wait_for_earlier_kernels();
    // clusters take tiles of neighbouring tokens with the same outputs
    uint32_t rows = ((tokens + TILE_M - 1) / TILE_M + ring.blocks - 1) / ring.blocks, columns = (e.width + TILE_N - 1) / TILE_N;
    uint32_t tiles = rows * columns, clusters = gridDim.x / ring.blocks, group = GROUP / ring.blocks;
    // in an order in which those that are worked on together read few rows of either operand
    auto first = [&](uint32_t tile, uint32_t& token, uint32_t& output) {
        uint32_t above = tile / (group * columns) * group, height = rows - above < group ? rows - above : group;
        uint32_t within = tile - above * columns;
        token = ((above + within % height) * ring.blocks + ring.rank) * TILE_M;
        output = within / height * TILE_N;
    };
    uint32_t token, output;
    uint32_t slices = (inputs + Ring::WIDTH - 1) / Ring::WIDTH;
    uint32_t turn = 0; // slices so far, over all tiles
    if (threadIdx.x < WARPGROUP) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            for (uint32_t tile = blockIdx.x / ring.blocks; tile < tiles; tile += clusters) {
                first(tile, token, output);
                for (uint32_t s = 0; s < slices; s++, turn++) {
                    ring.claim(turn);
                    ring.bring_x(turn, x, token, s);
                    ring.bring_w(turn, w, output, s);
                }
            }
        }
    } else {
        take_registers<232>();
        int half = threadIdx.x / WARPGROUP - 1, lane = lane_index();
        int g = lane / 4, t = lane % 4;
        for (uint32_t tile = blockIdx.x / ring.blocks; tile < tiles; tile += clusters) {
            float d[TILE_N / 2];
            ring.multiply<T, TILE_N>(d, turn, slices, half * 64, 0);
            first(tile, token, output);
            uint32_t warp_token = token + half * 64 + warp_index() % 4 * 16;
            if (narrow_result(e) && e.width % 8 == 0) {
                char* staged = shared + Ring::BYTES + (warp_index() - 4) * 16 * STAGED_STRIDE;
                finish_narrow<T>(e, staged, warp_token, tokens, output, d);
                continue;
            }
            UNROLL
            for (int j = 0; j < TILE_N / 8; j++) {
                uint32_t row = output + j * 8 + 2 * t;
                if (row >= e.width) continue;
                UNROLL
                for (int i = 0; i < 2; i++) {
                    uint32_t at = warp_token + g + i * 8;
                    if (at < tokens) finish_pair<T>(e, at, row, d[4 * j + 2 * i], d[4 * j + 2 * i + 1], row + 1 < e.width);
                }
            }
        }
    }
    if (ring.blocks > 1) sync_cluster(); // the other block's slices and arrivals have come
}

#define LINEAR_HOPPER(T)                                                                                               \
    KERNEL_ALONE(linear_hopper_##T, THREADS)                                                                           \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, uint32_t inputs, Epilogue e) { \
        linear_hopper<T>(&x, &w, tokens, inputs, e);                                                                   \
    }                                                                                                                  \
    EXPORT(linear_hopper_##T)
LINEAR_HOPPER(bf16)
LINEAR_HOPPER(f16)

#endif // HOPPER
