// A GEMM's tiles on Hopper with TMA and wgmma: y = epilogue(x W^T) for x [tokens, inputs] and W
// [outputs, inputs] in 16 bits, either of which may lie transposed in memory.
//
// A block computes tiles of 128 tokens by 256 outputs. The
// two blocks of a cluster work on the same outputs, and each multicasts half of the weights to
// both: L2 delivers (128 + 128) * inputs elements for 128 * 256 outputs, which is 128 FLOPs for
// each byte (85 without clusters, where there is only one tile of tokens).
// One block fills a multiprocessor and takes tile after tile, in groups of 16 tiles of tokens, so
// that the tiles in work at the same time read few rows of either operand from memory. One thread
// of the first warpgroup is the producer and loads slices of 64 inputs, three ahead; the other two
// warpgroups compute 64 tokens by 256 outputs each, straight from shared memory, and issue the
// wgmma of a slice before those of the previous one are waited for. Two mbarriers for each stage
// say when it is full and when it is empty, in both blocks.
// Results are finished and written by the other three warps of the first warpgroup, while the
// consumers compute the next tile. Consumers only leave their sums in shared memory, in f32: those
// of half of the outputs when a tile ends, and those of the other half, which they hold in
// registers so long, between two slices of the next tile. Tensor cores wait for 64 KB of stores a
// tile, by computation 512 cycles, where the slices of 1536 inputs take them 24576; GELU in the
// consumers would keep them waiting 4096 more, with two MUFU for each output. Bias, residual and
// addresses come before the sums do. The sums of the last tile, behind which nothing is left to
// compute, are written by the consumers themselves.
// The stages are three, because half of the sums take nearly the room of two more: a copy still has
// the time of two slices, by computation 2048 cycles. Beside four stages there would be room for a
// quarter of the sums, and too few registers for the other three.
#pragma once
#include "epilogue.cuh"
#include "linear.cuh"
#include "memory.cuh"
#include "tma_pipeline.cuh"

#if HOPPER

constexpr int TILE_M = LINEAR_HOPPER_TOKENS, TILE_N = LINEAR_HOPPER_OUTPUTS;
constexpr int CONSUMERS = 2;
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / WARP;
constexpr int WRITERS = WARPGROUP / WARP - 1; // warps of the producer's warpgroup
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
static_assert(THREADS == LINEAR_HOPPER_THREADS, "as the host launches it");
constexpr uint32_t GROUP = 16; // tiles of tokens that are taken together

// How operands lie in memory: transposed ones as [inputs, tokens] and [inputs, outputs]. SUMMED:
// the inputs of each token are added up too. DIVIDED: blocks may take parts of the inputs.
template <bool X_TRANS, bool W_TRANS, bool SUMMED = false, bool DIVIDED = false>
struct Layout {
    using Pipeline = TmaPipeline<TILE_M, TILE_N, LINEAR_HOPPER_STAGES, true, X_TRANS, W_TRANS>;
    static constexpr bool summed = SUMMED, divided = DIVIDED;
};

constexpr int ONES_BYTES = 1024; // a tile of 8 rows of 64 ones

constexpr int STAGED_OUTPUTS = TILE_N / 2;             // of a tile at a time
constexpr int STAGED_STRIDE = STAGED_OUTPUTS * 4 + 32; // the padding avoids bank conflicts
constexpr int WARP_TOKENS = 16;                        // of a consuming warp
constexpr int WARP_BYTES = WARP_TOKENS * STAGED_STRIDE;
static_assert(LINEAR_HOPPER_STAGED_BYTES == TILE_M * STAGED_STRIDE + 2 * 8, "as the host adds it");
static_assert(CONSUMER_WARPS * 2 * WARP_BYTES <=
                  LINEAR_HOPPER_STAGES * (TILE_M + TILE_N) * LINEAR_SLICE * 2,
              "room for the last tile");

// Sums that lie in shared memory, of STAGED_OUTPUTS outputs from `output` on and `rows` tokens from
// `token` on. A warp writes some of the tokens: number `first` and every `step`-th behind it.
struct StagedSums {
    const char* at;
    uint32_t token, rows, output, first, step;
};

// The same for `size` tokens, not all of which need exist. Results are written `shift` rows behind
// those of the tokens.
DEVICE StagedSums staged_sums(const char* at, uint32_t token, uint32_t size, uint32_t tokens,
                              uint32_t output, uint32_t first, uint32_t step, uint32_t shift) {
    uint32_t left = token < tokens ? tokens - token : 0;
    return StagedSums{at, token + shift, left < size ? left : size, output, first, step};
}

// Leaves half of a warp's sums, from d[FIRST] on, in shared memory. They are ordered as by
// wgmma_ss.
template <int FIRST, int SUMS>
DEVICE void stage_sums(char* staged, const float (&d)[SUMS]) {
    int lane = lane_index(), g = lane / 4, t = lane % 4;
    char* to = staged + g * STAGED_STRIDE + t * 8;
    UNROLL
    for (int j = 0; j < STAGED_OUTPUTS / 8; j++) {
        UNROLL
        for (int below = 0; below < 2; below++) {
            const float* pair = d + FIRST + 4 * j + 2 * below;
            *reinterpret_cast<Float2*>(to + below * 8 * STAGED_STRIDE + j * 32) =
                Float2{{pair[0], pair[1]}};
        }
    }
}

// What happens to sums that are written in 16 bits: nothing, GELU, or multiplication by the
// gradient of the GELU of the residual.
enum class Curve { NONE, GELU, GELU_GRADIENT };

// Finishes and writes sums in 16 bits. Each lane has the same eight outputs of every second row.
// What does not depend on the sums comes before `wait`.
template <class T, Curve CURVE, class Wait>
DEVICE void write_halves(const EpilogueArgs& e, const StagedSums& sums, Wait wait) {
    constexpr uint32_t LANES = STAGED_OUTPUTS / 8, ROWS = WARP / LANES; // of a row, and at a time
    uint32_t lane = lane_index(), output = sums.output + lane % LANES * 8;
    uint32_t rows = output < e.width ? sums.rows : 0;
    uint32_t row = sums.first * ROWS + lane / LANES, step = sums.step * ROWS;
    // every second group of four lanes begins with the second four outputs: eight lanes, which
    // shared memory serves at a time, then read from different banks
    uint32_t turned = lane / 4 % 2;
    Float4 bias[2] = {};
    HalfOutput<T> out = {};
    uint32_t slot = 0;
    if (row < rows) {
        UNROLL
        for (int i = 0; i < 2; i++)
            bias[i] = *reinterpret_cast<const Float4*>(e.bias + output + (i ^ turned) * 4);
        out = half_output_of<T>(e, output);
        if (out.cached) slot = e.slots[sums.token + row];
    }
    Pack16B before = {}, next = {};
    auto load_before = [&](uint32_t row) {
        if (CURVE != Curve::GELU_GRADIENT || row >= rows) return;
        const T* from = static_cast<const T*>(e.residual) + output;
        next = *reinterpret_cast<const Pack16B*>(from +
                                                 static_cast<size_t>(sums.token + row) * e.width);
    };
    load_before(row);
    wait();
    for (; row < rows; row += step) {
        const char* from = sums.at + row * STAGED_STRIDE + lane % LANES * 32;
        T* to = out.at(sums.token + row, slot);
        before = next;
        load_before(row + step);
        // the next slot comes while this row is finished
        if (out.cached && row + step < rows) slot = e.slots[sums.token + row + step];
        uint32_t packed[2][2];
        UNROLL
        for (int i = 0; i < 2; i++) {
            Float4 v = *reinterpret_cast<const Float4*>(from + (i ^ turned) * 16);
            UNROLL
            for (int k = 0; k < 4; k++) {
                v.v[k] += bias[i].v[k];
                if constexpr (CURVE == Curve::GELU) v.v[k] = gelu(v.v[k]);
                if constexpr (CURVE == Curve::GELU_GRADIENT) {
                    uint32_t pair =
                        turned ? before.pairs[(1 - i) * 2 + k / 2] : before.pairs[i * 2 + k / 2];
                    v.v[k] *= gelu_gradient(k % 2 ? high<T>(pair) : low<T>(pair));
                }
            }
            packed[i][0] = pack<T>(v.v[0], v.v[1]);
            packed[i][1] = pack<T>(v.v[2], v.v[3]);
        }
        Pack16B whole;
        UNROLL
        for (int i = 0; i < 4; i++)
            whole.pairs[i] = turned ? packed[1 - i / 2][i % 2] : packed[i / 2][i % 2];
        *reinterpret_cast<Pack16B*>(to) = whole;
    }
}

// Four neighbouring numbers of a residual in 16 bits or f32, as they lie in memory.
template <class R>
struct Four {
    Float2 raw;
    DEVICE_MEMBER Float4 floats() const {
        uint32_t a = float_as_uint(raw.v[0]), b = float_as_uint(raw.v[1]);
        return Float4{{low<R>(a), high<R>(a), low<R>(b), high<R>(b)}};
    }
};
template <>
struct Four<float> {
    Float4 raw;
    DEVICE_MEMBER Float4 floats() const { return raw; }
};

// Finishes and writes sums in f32, with a residual in R if there is one. Each lane has the same
// four outputs of every row. The residuals of BATCH rows are on their way at the same time.
template <class R, class Wait>
DEVICE void write_floats(const EpilogueArgs& e, const StagedSums& sums, Wait wait) {
    constexpr int BATCH = 8;
    uint32_t lane = lane_index(), output = sums.output + lane * 4;
    uint32_t rows = output < e.width ? sums.rows : 0;
    uint32_t residuals = e.mode == EPILOGUE_RESIDUAL ? rows : 0;
    size_t start = static_cast<size_t>(sums.token) * e.width + output;
    const R* added = static_cast<const R*>(e.residual) + start;
    float* out = static_cast<float*>(e.out) + start;
    Float4 bias = {};
    if (rows > 0) bias = *reinterpret_cast<const Float4*>(e.bias + output);
    Four<R> residual[BATCH];
    auto load_residuals = [&](uint32_t first) {
        UNROLL
        for (int i = 0; i < BATCH; i++) {
            uint32_t row = first + i * sums.step;
            residual[i] = Four<R>{};
            if (row < residuals)
                residual[i] = *reinterpret_cast<const Four<R>*>(added + row * e.width);
        }
    };
    load_residuals(sums.first);
    wait();
    for (uint32_t first = sums.first; first < rows; first += BATCH * sums.step) {
        UNROLL
        for (int i = 0; i < BATCH; i++) {
            uint32_t row = first + i * sums.step;
            if (row >= rows) break;
            Float4 v = *reinterpret_cast<const Float4*>(sums.at + row * STAGED_STRIDE + lane * 16);
            Float4 r = residual[i].floats();
            UNROLL
            for (int k = 0; k < 4; k++) v.v[k] = v.v[k] + bias.v[k] + r.v[k];
            *reinterpret_cast<Float4*>(out + row * e.width) = v;
        }
        load_residuals(first + BATCH * sums.step);
    }
}

// Finishes and writes results of a width that is no multiple of 8, for which speed does not matter:
// widths of models are multiples of 16.
template <class T, class Wait>
DEVICE void write_pairs(const EpilogueArgs& e, const StagedSums& sums, Wait wait) {
    wait();
    for (uint32_t row = sums.first; row < sums.rows; row += sums.step) {
        for (uint32_t column = lane_index() * 2; column < STAGED_OUTPUTS; column += WARP * 2) {
            const float* pair =
                reinterpret_cast<const float*>(sums.at + row * STAGED_STRIDE) + column;
            uint32_t output = sums.output + column;
            if (output < e.width) {
                epilogue_pair<T>(e, sums.token + row, output, pair[0], pair[1],
                                 output + 1 < e.width);
            }
        }
    }
}

// Calls `use` with the function that finishes and writes a warp's share of sums, which are there
// once what it is given to wait with has returned. The epilogue is chosen outside of all loops, so
// that the loops of each keep only their own numbers in registers.
template <class T, class Layout, class Use>
DEVICE void with_epilogue(const EpilogueArgs& e, Use use) {
    if constexpr (Layout::divided) {
        if (e.mode == EPILOGUE_GELU_GRADIENT) {
            use([&](const StagedSums& sums, auto wait) {
                write_halves<T, Curve::GELU_GRADIENT>(e, sums, wait);
            });
        } else if (half_output(e)) {
            use([&](const StagedSums& sums, auto wait) {
                write_halves<T, Curve::NONE>(e, sums, wait);
            });
        } else {
            use([&](const StagedSums& sums, auto wait) { write_floats<float>(e, sums, wait); });
        }
    } else if (e.width % 8 != 0) {
        use([&](const StagedSums& sums, auto wait) { write_pairs<T>(e, sums, wait); });
    } else if (e.mode == EPILOGUE_GELU) {
        use([&](const StagedSums& sums, auto wait) {
            write_halves<T, Curve::GELU>(e, sums, wait);
        });
    } else if (half_output(e)) {
        use([&](const StagedSums& sums, auto wait) {
            write_halves<T, Curve::NONE>(e, sums, wait);
        });
    } else if (e.half_residual) {
        use([&](const StagedSums& sums, auto wait) { write_floats<T>(e, sums, wait); });
    } else {
        use([&](const StagedSums& sums, auto wait) { write_floats<float>(e, sums, wait); });
    }
}

// Brings a warp's share of the residuals, or of the inputs of GELUs, of half a tile to L2 while its
// sums are computed.
template <class Layout>
DEVICE void prefetch_residuals(const EpilogueArgs& e, const StagedSums& sums) {
    bool gelu = Layout::divided && e.mode == EPILOGUE_GELU_GRADIENT;
    if (e.mode != EPILOGUE_RESIDUAL && !gelu) return;
    uint32_t size = e.half_residual ? 2 : 4, lines = STAGED_OUTPUTS * size / 128;
    for (uint32_t i = sums.first * WARP + lane_index(); i < sums.rows * lines;
         i += sums.step * WARP) {
        uint32_t output = sums.output + i % lines * 128 / size;
        size_t at = static_cast<size_t>(sums.token + i / lines) * e.width + output;
        if (output < e.width) prefetch_l2_line(static_cast<const char*>(e.residual) + at * size);
    }
}

// The order in which a block takes tiles: neighbouring tokens for the blocks of a cluster, and
// groups of tiles in which those in work at the same time share rows.
template <class Layout>
struct Schedule {
    uint32_t rows, columns, tiles, blocks, rank, step, slices;
    GemmDivision division;
    DEVICE_MEMBER Schedule(const typename Layout::Pipeline& pipeline, uint32_t tokens,
                           uint32_t inputs, uint32_t width, const GemmDivision& division)
        : blocks(pipeline.blocks), rank(pipeline.rank), division(division) {
        rows = ((tokens + TILE_M - 1) / TILE_M + blocks - 1) / blocks;
        columns = (width + TILE_N - 1) / TILE_N;
        tiles = rows * columns * (Layout::divided ? division.parts : 1);
        step = gridDim.x / blocks;
        slices = (inputs + LINEAR_SLICE - 1) / LINEAR_SLICE;
    }
    // The part of the inputs that a tile is of.
    DEVICE_MEMBER uint32_t part(uint32_t tile) const {
        return Layout::divided ? tile / (rows * columns) : 0;
    }
    DEVICE_MEMBER uint32_t first_slice(uint32_t tile) const {
        return Layout::divided ? part(tile) * division.part_slices : 0;
    }
    // Slices of a tile.
    DEVICE_MEMBER uint32_t count(uint32_t tile) const {
        if (!Layout::divided) return slices;
        uint32_t left = slices - first_slice(tile);
        return left < division.part_slices ? left : division.part_slices;
    }
    DEVICE_MEMBER uint32_t begin() const { return blockIdx.x / blocks; }
    DEVICE_MEMBER bool last(uint32_t tile) const { return tile + step >= tiles; }
    // The first token and output of a tile.
    DEVICE_MEMBER void locate(uint32_t tile, uint32_t& token, uint32_t& output) const {
        if (Layout::divided) tile %= rows * columns;
        uint32_t group = GROUP / blocks;
        uint32_t above = tile / (group * columns) * group,
                 height = rows - above < group ? rows - above : group;
        uint32_t within = tile - above * columns;
        token = ((above + within % height) * blocks + rank) * TILE_M;
        output = within / height * TILE_N;
    }
};

// Where consumers leave sums for the writers, half a tile at a time.
struct Staging {
    char* rows;
    uint64_t *full, *empty;
    DEVICE_MEMBER Staging(char* at)
        : rows(at), full(reinterpret_cast<uint64_t*>(at + TILE_M * STAGED_STRIDE)),
          empty(full + 1) {
        if (threadIdx.x == 0) {
            mbarrier_init(full, CONSUMER_WARPS);
            mbarrier_init(empty, WRITERS);
        }
    }
};

// Writes the results of all tiles but the last one, by one of the WRITERS warps.
template <class Layout, class Write>
DEVICE void write_tiles(const Schedule<Layout>& schedule, const Staging& staging,
                        const EpilogueArgs& e, uint32_t tokens, uint32_t writer, Write write) {
    uint32_t token, output, turn = 0; // counts halves of tiles
    for (uint32_t tile = schedule.begin(); tile < schedule.tiles; tile += schedule.step) {
        schedule.locate(tile, token, output);
        for (int part = 0; part < 2; part++, turn++) {
            StagedSums sums =
                staged_sums(staging.rows, token, TILE_M, tokens, output + part * STAGED_OUTPUTS,
                            writer, WRITERS, schedule.part(tile) * tokens);
            prefetch_residuals<Layout>(e, sums);
            if (schedule.last(tile)) continue;
            write(sums, [&] { mbarrier_wait_parity(staging.full, turn & 1); });
            warp_sync();
            if (lane_index() == 0) mbarrier_arrive(staging.empty);
        }
    }
}

// Writes the sums of the inputs of a warp's tokens, of which `ones` are the products by ones.
template <class Layout>
DEVICE void write_input_sums(const Schedule<Layout>& schedule, uint32_t tile, uint32_t first,
                             uint32_t tokens, const float (&ones)[4]) {
    uint32_t lane = lane_index();
    if (lane % 4 != 0) return;
    UNROLL
    for (uint32_t below = 0; below < 2; below++) {
        uint32_t token = first + below * 8 + lane / 4;
        if (token >= tokens) continue;
        float* to = schedule.division.row_sums + schedule.part(tile) * tokens + token;
        *to = ones[2 * below] + (schedule.division.accumulate ? *to : 0.0f);
    }
}

// Computes all tiles, by a warpgroup with half of the tokens. `ones` is a tile of ones.
template <class T, class Layout>
DEVICE void compute_tiles(const Schedule<Layout>& schedule,
                          const typename Layout::Pipeline& pipeline, const Staging& staging,
                          const EpilogueArgs& e, uint32_t tokens, const char* ones) {
    uint32_t warp = warp_index() - WARPGROUP / WARP, first_token = warp / 4 * 64;
    uint32_t iteration = 0, turn = 0;
    char* staged = staging.rows + warp * WARP_BYTES;
    float d[TILE_N / 2], held[TILE_N / 4];
    auto hand_over = [&](auto stage) {
        mbarrier_wait_parity(staging.empty, (turn + 1) & 1);
        stage();
        warp_sync();
        if (lane_index() == 0) mbarrier_arrive(staging.full);
        turn++;
    };
    for (uint32_t tile = schedule.begin(); tile < schedule.tiles; tile += schedule.step) {
        UNROLL
        for (int i = 0; i < TILE_N / 2; i++) d[i] = 0;
        uint32_t slices = schedule.count(tile), token, output;
        float sums[4] = {};
        auto add = [&](uint32_t begin, uint32_t end) {
            if constexpr (Layout::summed) {
                pipeline.template add_slices<T, TILE_N>(d, iteration, begin, end, first_token, 0,
                                                        sums, ones);
            } else {
                pipeline.template add_slices<T, TILE_N>(d, iteration, begin, end, first_token, 0);
            }
        };
        add(0, slices / 2);
        if (turn > 0) hand_over([&] { stage_sums<0>(staged, held); });
        add(slices / 2, slices);
        pipeline.finish_slices(d, iteration, slices);
        if constexpr (Layout::summed) {
            wgmma_fence_operand(sums);
            schedule.locate(tile, token, output);
            if (schedule.division.row_sums && output == 0)
                write_input_sums(schedule, tile, token + warp * WARP_TOKENS, tokens, sums);
        }
        if (schedule.last(tile)) break;
        hand_over([&] { stage_sums<0>(staged, d); });
        UNROLL
        for (int i = 0; i < TILE_N / 4; i++) held[i] = d[TILE_N / 4 + i];
    }
    // Nothing is left to compute while the last tile is written, so its consumers do that. No more
    // slices come to the stages, and once both warpgroups have read the last one, sums go there.
    named_barrier_sync(1, CONSUMERS * WARPGROUP);
    uint32_t token, output, tile = schedule.begin();
    tile += (schedule.tiles - 1 - tile) / schedule.step * schedule.step;
    schedule.locate(tile, token, output);
    staged = pipeline.shared + warp * 2 * WARP_BYTES;
    stage_sums<0>(staged, d);
    stage_sums<TILE_N / 4>(staged + WARP_BYTES, d);
    warp_sync();
    with_epilogue<T, Layout>(e, [&](auto write) {
        for (int part = 0; part < 2; part++) {
            write(staged_sums(staged + part * WARP_BYTES, token + warp * WARP_TOKENS, WARP_TOKENS,
                              tokens, output + part * STAGED_OUTPUTS, 0, 1,
                              schedule.part(tile) * tokens),
                  [] {});
        }
    });
}

// Shared memory holds the pipeline, then the staging area, then, if inputs are summed, from a
// multiple of 1024 bytes on, a tile of ones. Every block has a tile.
template <class T, class Layout>
DEVICE void gemm_hopper(const TensorMap* x, const TensorMap* w, uint32_t tokens, uint32_t inputs,
                        const EpilogueArgs& e, const GemmDivision& division) {
    using Pipeline = typename Layout::Pipeline;
    char* shared = shared_memory();
    char* ones = shared + GEMM_HOPPER_ONES_AT;
    static_assert(Pipeline::BYTES + LINEAR_HOPPER_STAGED_BYTES <= GEMM_HOPPER_ONES_AT, "room");
    if constexpr (Layout::summed) {
        if (threadIdx.x < ONES_BYTES / 4) {
            reinterpret_cast<uint32_t*>(ones)[threadIdx.x] = pack<T>(1, 1);
            fence_proxy_async();
        }
    }
    if (threadIdx.x == 0) {
        prefetch_tensormap(x);
        prefetch_tensormap(w);
    }
    Staging staging(shared + Pipeline::BYTES);
    Pipeline pipeline(shared, CONSUMER_WARPS); // meets all threads when its mbarriers are there too
    // blocks of the next kernel may start where blocks of this one have ended
    griddep_launch_dependents();
    griddep_wait();
    Schedule<Layout> schedule(pipeline, tokens, inputs, e.width, division);
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_dec<88>();
        if (warp_index() > 0) {
            with_epilogue<T, Layout>(e, [&](auto write) {
                write_tiles(schedule, staging, e, tokens, warp_index() - 1, write);
            });
        } else if (threadIdx.x == 0) {
            uint32_t token, output, iteration = 0; // counts the slices of all tiles
            for (uint32_t tile = schedule.begin(); tile < schedule.tiles; tile += schedule.step) {
                schedule.locate(tile, token, output);
                uint32_t first = schedule.first_slice(tile), end = first + schedule.count(tile);
                for (uint32_t s = first; s < end; s++, iteration++) {
                    pipeline.producer_acquire(iteration);
                    pipeline.load_x(iteration, x, token, s);
                    pipeline.load_w(iteration, w, output, s);
                }
            }
        }
    } else {
        setmaxnreg_inc<208>();
        compute_tiles<T>(schedule, pipeline, staging, e, tokens, ones);
    }
    // copies to the other block and arrivals there are complete
    if (pipeline.blocks > 1) cluster_sync();
}

#endif // HOPPER
