// y = epilogue(x W^T) for many tokens on Hopper, with TMA and wgmma.
//
//   x [tokens, inputs] and W [outputs, inputs] in 16 bits
//
// FLOPs: 2 * tokens * inputs * outputs. A block computes tiles of 128 tokens by 256 outputs. The
// two blocks of a cluster work on the same outputs, and each multicasts half of the weights to
// both: L2 delivers (128 + 128) * inputs elements for 128 * 256 outputs, which is 128 FLOPs for
// each byte (85 without clusters, where there is only one tile of tokens).
// One block fills a multiprocessor and takes tile after tile, in groups of 16 tiles of tokens, so
// that the tiles in work at the same time read few rows of either operand from memory. One thread
// of the first warpgroup is the producer and loads slices of 64 inputs, four ahead; the other two
// warpgroups compute 64 tokens by 256 outputs each, straight from shared memory, and issue the
// wgmma of a slice before those of the previous one are waited for. Two mbarriers for each stage
// say when it is full and when it is empty, in both blocks. Results go through shared memory, 128
// bytes of a token at a time, so that whole lines are written and whole lines of the residual are
// read.
#include "epilogue.cuh"
#include "linear.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "tma_pipeline.cuh"

#if HOPPER

constexpr int TILE_M = LINEAR_HOPPER_TOKENS, TILE_N = LINEAR_HOPPER_OUTPUTS;
constexpr int CONSUMERS = 2;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
static_assert(THREADS == LINEAR_HOPPER_THREADS, "as the host launches it");
using Pipeline = TmaPipeline<TILE_M, TILE_N, LINEAR_HOPPER_STAGES, true>;
constexpr uint32_t GROUP = 16; // tiles of tokens that are taken together

constexpr int STAGED_COLUMNS = 64;
constexpr int STAGED_STRIDE = STAGED_COLUMNS * 2 + 16; // the padding avoids bank conflicts
constexpr int FLOAT_COLUMNS = 32,
              FLOAT_STRIDE = FLOAT_COLUMNS * 4 + 32;     // the same for results in f32
constexpr int STAGED_BYTES = LINEAR_HOPPER_STAGED_BYTES; // of each consuming warp
static_assert(STAGED_BYTES == 16 * FLOAT_STRIDE, "room for 16 tokens");

// Writes a warp's 16 tokens by 256 outputs in 16 bits, if CURVED after GELU. The accumulators in
// `d` are ordered as by wgmma_ss; `staged` is shared memory of this warp for 16 rows.
template <class T, bool CURVED>
DEVICE void store_half_tile(const EpilogueArgs& e, char* staged, uint32_t first_token,
                            uint32_t tokens, uint32_t first_row, const float (&d)[TILE_N / 2]) {
    constexpr int CHUNKS = STAGED_COLUMNS / 8; // chunks of 16 bytes in a staged row
    int lane = lane_index(), t = lane % 4;
    UNROLL
    for (int part = 0; part < TILE_N / STAGED_COLUMNS; part++) {
        UNROLL
        for (int j = 0; j < CHUNKS; j += 2) {
            uint32_t four[4];
            UNROLL
            for (int i = 0; i < 4; i++) {
                int column = part * STAGED_COLUMNS + (j + i / 2) * 8;
                uint32_t row = first_row + column + 2 * t;
                float bias[2] = {row < e.width ? e.bias[row] : 0,
                                 row < e.width ? e.bias[row + 1] : 0};
                float a = d[column / 2 + i % 2 * 2] + bias[0],
                      b = d[column / 2 + i % 2 * 2 + 1] + bias[1];
                four[i] = CURVED ? pack<T>(gelu(a), gelu(b)) : pack<T>(a, b);
            }
            stmatrix_x4(staged + (lane / 8 % 2 * 8 + lane % 8) * STAGED_STRIDE +
                            (j + lane / 16) * 16,
                        four);
        }
        warp_sync();
        UNROLL
        for (int i = lane; i < 16 * CHUNKS; i += WARP) {
            uint32_t token = first_token + i / CHUNKS,
                     row = first_row + part * STAGED_COLUMNS + i % CHUNKS * 8;
            if (token < tokens && row < e.width) {
                *reinterpret_cast<Pack16B*>(half_output_at<T>(e, token, row)) =
                    load(reinterpret_cast<const Pack16B*>(staged + i / CHUNKS * STAGED_STRIDE +
                                                          i % CHUNKS * 16));
            }
        }
        warp_sync();
    }
}

// Leaves a part of a warp's results, FLOAT_COLUMNS outputs of 16 tokens, in shared memory.
DEVICE void stage_floats(char* staged, const float (&d)[TILE_N / 2], int part) {
    int lane = lane_index(), g = lane / 4, t = lane % 4;
    UNROLL
    for (int j = 0; j < FLOAT_COLUMNS / 8; j++) {
        const float* from = d + (part * FLOAT_COLUMNS + j * 8) / 2;
        UNROLL
        for (int half = 0; half < 2; half++) {
            float* to =
                reinterpret_cast<float*>(staged + (g + 8 * half) * FLOAT_STRIDE) + j * 8 + 2 * t;
            to[0] = from[2 * half];
            to[1] = from[2 * half + 1];
        }
    }
}

// Writes the same in f32. The residual of the next part is loaded while this part is written.
template <class T, uint32_t MODE>
DEVICE void store_float_tile(const EpilogueArgs& e, char* staged, uint32_t first_token,
                             uint32_t tokens, uint32_t first_row, const float (&d)[TILE_N / 2]) {
    constexpr int PARTS = TILE_N / FLOAT_COLUMNS;
    constexpr int ROWS = 4; // each lane has the same four columns of every fourth token
    int lane = lane_index(), chunk = lane % 8;
    uint32_t first = first_token + lane / 8;
    auto offset = [&](int part, int i) {
        return static_cast<size_t>(first + i * 4) * e.width + first_row + part * FLOAT_COLUMNS +
               chunk * 4;
    };
    auto exists = [&](int part, int i) {
        return first + i * 4 < tokens && first_row + part * FLOAT_COLUMNS + chunk * 4 < e.width;
    };
    auto load_residual = [&](int part, Float4(&r)[ROWS]) {
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            r[i] = Float4{};
            if (MODE != EPILOGUE_RESIDUAL || !exists(part, i)) continue;
            if (e.half_residual) {
                const uint32_t* pairs = reinterpret_cast<const uint32_t*>(
                    static_cast<const T*>(e.residual) + offset(part, i));
                r[i] = Float4{
                    {low<T>(pairs[0]), high<T>(pairs[0]), low<T>(pairs[1]), high<T>(pairs[1])}};
            } else {
                r[i] = *reinterpret_cast<const Float4*>(static_cast<const float*>(e.residual) +
                                                        offset(part, i));
            }
        }
    };
    Float4 residual[ROWS], next[ROWS];
    load_residual(0, next);
    UNROLL
    for (int part = 0; part < PARTS; part++) {
        UNROLL
        for (int i = 0; i < ROWS; i++) residual[i] = next[i];
        stage_floats(staged, d, part);
        if (part + 1 < PARTS) load_residual(part + 1, next);
        warp_sync();
        Float4 bias = {};
        if (exists(part, 0))
            bias = *reinterpret_cast<const Float4*>(e.bias + first_row + part * FLOAT_COLUMNS +
                                                    chunk * 4);
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            Float4 v = *reinterpret_cast<const Float4*>(staged + (i * 4 + lane / 8) * FLOAT_STRIDE +
                                                        chunk * 16);
            UNROLL
            for (int k = 0; k < 4; k++) v.v[k] = v.v[k] + bias.v[k] + residual[i].v[k];
            if (exists(part, i))
                *reinterpret_cast<Float4*>(static_cast<float*>(e.out) + offset(part, i)) = v;
        }
        warp_sync();
    }
}

// Writes results of a width that is no multiple of 8, for which speed does not matter: widths of
// models are multiples of 16.
template <class T>
DEVICE void store_pairs(const EpilogueArgs& e, char* staged, uint32_t first_token, uint32_t tokens,
                        uint32_t first_row, const float (&d)[TILE_N / 2]) {
    UNROLL
    for (int part = 0; part < TILE_N / FLOAT_COLUMNS; part++) {
        stage_floats(staged, d, part);
        warp_sync();
        for (uint32_t i = lane_index(); i < 16 * FLOAT_COLUMNS / 2; i += WARP) {
            uint32_t token = i / (FLOAT_COLUMNS / 2), column = i % (FLOAT_COLUMNS / 2) * 2,
                     row = first_row + part * FLOAT_COLUMNS + column;
            const float* pair =
                reinterpret_cast<const float*>(staged + token * FLOAT_STRIDE) + column;
            if (first_token + token < tokens && row < e.width)
                epilogue_pair<T>(e, first_token + token, row, pair[0], pair[1], row + 1 < e.width);
        }
        warp_sync();
    }
}

// Writes a warp's results. The mode is decided once for each tile, so that each mode has code of
// its own.
template <class T>
DEVICE void epilogue_tile(const EpilogueArgs& e, char* staged, uint32_t first_token,
                          uint32_t tokens, uint32_t first_row, const float (&d)[TILE_N / 2]) {
    if (e.width % 8 != 0) {
        store_pairs<T>(e, staged, first_token, tokens, first_row, d);
        return;
    }
    switch (e.mode) {
    case EPILOGUE_GELU:
        store_half_tile<T, true>(e, staged, first_token, tokens, first_row, d);
        break;
    case EPILOGUE_HALF:
    case EPILOGUE_QKV:
        store_half_tile<T, false>(e, staged, first_token, tokens, first_row, d);
        break;
    case EPILOGUE_RESIDUAL:
        store_float_tile<T, EPILOGUE_RESIDUAL>(e, staged, first_token, tokens, first_row, d);
        break;
    default:
        store_float_tile<T, EPILOGUE_BIAS>(e, staged, first_token, tokens, first_row, d);
        break;
    }
}

// Shared memory holds the pipeline, then what `epilogue_tile` needs for each consuming warp.
template <class T>
DEVICE void linear_hopper(const TensorMap* x, const TensorMap* w, uint32_t tokens, uint32_t inputs,
                          const EpilogueArgs& e) {
    char* shared = shared_memory();
    if (threadIdx.x == 0) {
        prefetch_tensormap(x);
        prefetch_tensormap(w);
    }
    Pipeline pipeline(shared, CONSUMERS * WARPGROUP / WARP);
    // blocks of the next kernel may start where blocks of this one have ended
    griddep_launch_dependents();
    griddep_wait();
    // the blocks of a cluster take neighbouring tokens of the same outputs
    uint32_t rows = ((tokens + TILE_M - 1) / TILE_M + pipeline.blocks - 1) / pipeline.blocks,
             columns = (e.width + TILE_N - 1) / TILE_N;
    uint32_t tiles = rows * columns, clusters = gridDim.x / pipeline.blocks,
             group = GROUP / pipeline.blocks;
    // the first token and output of a tile, in an order in which tiles in work at the same time
    // share rows
    auto first = [&](uint32_t tile, uint32_t& token, uint32_t& output) {
        uint32_t above = tile / (group * columns) * group,
                 height = rows - above < group ? rows - above : group;
        uint32_t within = tile - above * columns;
        token = ((above + within % height) * pipeline.blocks + pipeline.rank) * TILE_M;
        output = within / height * TILE_N;
    };
    uint32_t token, output;
    uint32_t slices = (inputs + Pipeline::WIDTH - 1) / Pipeline::WIDTH;
    uint32_t iteration = 0; // counts the slices of all tiles
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) {
            for (uint32_t tile = blockIdx.x / pipeline.blocks; tile < tiles; tile += clusters) {
                first(tile, token, output);
                for (uint32_t s = 0; s < slices; s++, iteration++) {
                    pipeline.producer_acquire(iteration);
                    pipeline.load_x(iteration, x, token, s);
                    pipeline.load_w(iteration, w, output, s);
                }
            }
        }
    } else {
        setmaxnreg_inc<232>();
        int half = threadIdx.x / WARPGROUP - 1;
        for (uint32_t tile = blockIdx.x / pipeline.blocks; tile < tiles; tile += clusters) {
            float d[TILE_N / 2];
            pipeline.mainloop<T, TILE_N>(d, iteration, slices, half * 64, 0);
            first(tile, token, output);
            uint32_t warp_token = token + half * 64 + warp_index() % 4 * 16;
            epilogue_tile<T>(e, shared + Pipeline::BYTES + (warp_index() - 4) * STAGED_BYTES,
                             warp_token, tokens, output, d);
        }
    }
    // copies to the other block and arrivals there are complete
    if (pipeline.blocks > 1) cluster_sync();
}

#define LINEAR_HOPPER(T)                                                                \
    KERNEL_ALONE(linear_hopper_##T, THREADS)                                            \
    (const GRID_CONSTANT TensorMap x, const GRID_CONSTANT TensorMap w, uint32_t tokens, \
     uint32_t inputs, EpilogueArgs e) {                                                 \
        linear_hopper<T>(&x, &w, tokens, inputs, e);                                    \
    }                                                                                   \
    EXPORT(linear_hopper_##T)
LINEAR_HOPPER(bf16)
LINEAR_HOPPER(f16)

#endif // HOPPER
