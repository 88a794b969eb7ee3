// y = epilogue(x W^T) for many tokens on Hopper: copies by the copy engine, products by warpgroups.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//
// FLOPs: 2 * tokens * inputs * outputs. A block has a tile of 128 tokens by 256 outputs; two blocks
// of a cluster have the same outputs, and each brings half of the weights to both: (128 + 128) *
// inputs elements from the second-level cache for 128 * 256 outputs, 128 FLOPs a byte (85 without
// clusters, where there is one tile of tokens). One block fills a multiprocessor and takes tile
// after tile, in groups of 16 tiles of tokens, so that what is worked on at a time reads few rows
// of either operand from memory. One thread of the first warpgroup asks for slices of 64 inputs,
// four ahead; the other two warpgroups multiply 64 tokens by 256 outputs each, straight from shared
// memory, with the next slice's products begun before the last one's are waited for. A pair of
// barrier objects for each stage says when it is full and when it is free, in both blocks. Results
// go through shared memory, 128 bytes of a token at a time, so that whole lines are written and the
// residual is read in such.
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

constexpr int STAGED_COLUMNS = 64;
constexpr int STAGED_STRIDE = STAGED_COLUMNS * 2 + 16;                // rows meet no bank twice
constexpr int WIDE_COLUMNS = 32, WIDE_STRIDE = WIDE_COLUMNS * 4 + 32; // nor do these, in f32
constexpr int STAGED_BYTES = 16 * WIDE_STRIDE;                        // of a warp

// Writes a warp's 16 tokens by 256 outputs in 16 bits. `d` as `multiply_group` leaves it; `staged`:
// the warp's own, 16 rows.
template <class T, uint32_t MODE>
DEVICE void finish_narrow(const Epilogue& of, char* staged, uint32_t first_token, uint32_t tokens,
                          uint32_t first_row, const float (&d)[TILE_N / 2]) {
    constexpr int PIECES = STAGED_COLUMNS / 8; // of 16 bytes
    Epilogue e = of;
    e.mode = MODE; // known as this is compiled
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
                float bias[2] = {row < e.width ? e.bias[row] : 0,
                                 row < e.width ? e.bias[row + 1] : 0};
                float a = d[column / 2 + i % 2 * 2] + bias[0],
                      b = d[column / 2 + i % 2 * 2 + 1] + bias[1];
                four[i] = e.mode == GELU ? pack<T>(gelu(a), gelu(b)) : pack<T>(a, b);
            }
            store_matrices(staged + (lane / 8 % 2 * 8 + lane % 8) * STAGED_STRIDE +
                               (j + lane / 16) * 16,
                           four);
        }
        sync_warp();
        UNROLL
        for (int i = lane; i < 16 * PIECES; i += WARP) {
            uint32_t token = first_token + i / PIECES,
                     row = first_row + part * STAGED_COLUMNS + i % PIECES * 8;
            if (token < tokens && row < e.width) {
                *reinterpret_cast<Eight*>(narrow_place<T>(e, token, row)) =
                    load(reinterpret_cast<const Eight*>(staged + i / PIECES * STAGED_STRIDE +
                                                        i % PIECES * 16));
            }
        }
        sync_warp();
    }
}

// The same in f32, with the residual of a part on its way while the part before is written.
template <class T, uint32_t MODE>
DEVICE void finish_wide(const Epilogue& e, char* staged, uint32_t first_token, uint32_t tokens,
                        uint32_t first_row, const float (&d)[TILE_N / 2]) {
    constexpr int PARTS = TILE_N / WIDE_COLUMNS;
    constexpr int ROWS = 4; // a lane has the same four columns of every fourth token
    int lane = lane_index(), g = lane / 4, t = lane % 4, piece = lane % 8;
    uint32_t first = first_token + lane / 8;
    auto place = [&](int part, int i) {
        return static_cast<size_t>(first + i * 4) * e.width + first_row + part * WIDE_COLUMNS +
               piece * 4;
    };
    auto there = [&](int part, int i) {
        return first + i * 4 < tokens && first_row + part * WIDE_COLUMNS + piece * 4 < e.width;
    };
    auto ask = [&](int part, Four(&r)[ROWS]) {
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            r[i] = Four{};
            if (MODE != RESIDUAL || !there(part, i)) continue;
            if (e.narrow_residual) {
                const uint32_t* pairs = reinterpret_cast<const uint32_t*>(
                    static_cast<const T*>(e.residual) + place(part, i));
                r[i] = Four{
                    {low<T>(pairs[0]), high<T>(pairs[0]), low<T>(pairs[1]), high<T>(pairs[1])}};
            } else {
                r[i] = *reinterpret_cast<const Four*>(static_cast<const float*>(e.residual) +
                                                      place(part, i));
            }
        }
    };
    Four residual[ROWS], next[ROWS];
    ask(0, next);
    UNROLL
    for (int part = 0; part < PARTS; part++) {
        UNROLL
        for (int i = 0; i < ROWS; i++) residual[i] = next[i];
        UNROLL
        for (int j = 0; j < WIDE_COLUMNS / 8; j++) {
            const float* from = d + (part * WIDE_COLUMNS + j * 8) / 2;
            UNROLL
            for (int half = 0; half < 2; half++) {
                float* to =
                    reinterpret_cast<float*>(staged + (g + 8 * half) * WIDE_STRIDE) + j * 8 + 2 * t;
                to[0] = from[2 * half];
                to[1] = from[2 * half + 1];
            }
        }
        if (part + 1 < PARTS) ask(part + 1, next);
        sync_warp();
        Four bias = {};
        if (there(part, 0))
            bias = *reinterpret_cast<const Four*>(e.bias + first_row + part * WIDE_COLUMNS +
                                                  piece * 4);
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            Four v = *reinterpret_cast<const Four*>(staged + (i * 4 + lane / 8) * WIDE_STRIDE +
                                                    piece * 16);
            UNROLL
            for (int k = 0; k < 4; k++) v.v[k] = v.v[k] + bias.v[k] + residual[i].v[k];
            if (there(part, i))
                *reinterpret_cast<Four*>(static_cast<float*>(e.out) + place(part, i)) = v;
        }
        sync_warp();
    }
}

// Writes a warp's sums; the mode is chosen once a tile, so that each has code of its own.
template <class T>
DEVICE void finish_tile(const Epilogue& e, char* staged, uint32_t first_token, uint32_t tokens,
                        uint32_t first_row, const float (&d)[TILE_N / 2]) {
    switch (e.mode) {
    case GELU: finish_narrow<T, GELU>(e, staged, first_token, tokens, first_row, d); break;
    case QKV: finish_narrow<T, QKV>(e, staged, first_token, tokens, first_row, d); break;
    case RESIDUAL: finish_wide<T, RESIDUAL>(e, staged, first_token, tokens, first_row, d); break;
    default: finish_wide<T, BIAS>(e, staged, first_token, tokens, first_row, d); break;
    }
}

// Shared memory: the ring, then what `finish_tile` needs for each consuming warp.
template <class T>
DEVICE void linear_hopper(const TensorMap* x, const TensorMap* w, uint32_t tokens, uint32_t inputs,
                          const Epilogue& e) {
    char* shared = shared_memory();
    Ring ring(shared, CONSUMERS * WARPGROUP / WARP);
    wait_for_earlier_kernels();
    // clusters take tiles of neighbouring tokens with the same outputs
    uint32_t rows = ((tokens + TILE_M - 1) / TILE_M + ring.blocks - 1) / ring.blocks,
             columns = (e.width + TILE_N - 1) / TILE_N;
    uint32_t tiles = rows * columns, clusters = gridDim.x / ring.blocks,
             group = GROUP / ring.blocks;
    // in an order in which those that are worked on together read few rows of either operand
    auto first = [&](uint32_t tile, uint32_t& token, uint32_t& output) {
        uint32_t above = tile / (group * columns) * group,
                 height = rows - above < group ? rows - above : group;
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
            if (e.width % 8 == 0) {
                finish_tile<T>(e, shared + Ring::BYTES + (warp_index() - 4) * STAGED_BYTES,
                               warp_token, tokens, output, d);
                continue;
            }
            UNROLL
            for (int j = 0; j < TILE_N / 8; j++) {
                uint32_t row = output + j * 8 + 2 * t;
                if (row >= e.width) continue;
                UNROLL
                for (int i = 0; i < 2; i++) {
                    uint32_t at = warp_token + g + i * 8;
                    if (at < tokens)
                        finish_pair<T>(e, at, row, d[4 * j + 2 * i], d[4 * j + 2 * i + 1],
                                       row + 1 < e.width);
                }
            }
        }
    }
    if (ring.blocks > 1) sync_cluster(); // the other block's slices and arrivals have come
}

#define LINEAR_HOPPER(T)                                                                \
    KERNEL_ALONE(linear_hopper_##T, THREADS)                                            \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t inputs, Epilogue e) {                                                     \
        linear_hopper<T>(&x, &w, tokens, inputs, e);                                    \
    }                                                                                   \
    EXPORT(linear_hopper_##T)
LINEAR_HOPPER(bf16)
LINEAR_HOPPER(f16)

#endif // HOPPER
