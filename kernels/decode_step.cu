// All layers of a decoding step for at most 8 sequences, in one launch (after the Megakernels
// design, Hazy Research 2025).
//
// Least bytes: the weights. If every layer is launched as kernels of its own, each of some hundred
// kernels begins with an empty pipeline: it waits for its first weights, and for the last block of
// the kernel before. Here one block stays on each multiprocessor, and its share of the weights of
// all layers is one stream that never stops: every warp keeps DEPTH chunks of 2 KB in flight
// (cp.async) to a ring of its own in shared memory, across the barriers at which blocks wait for
// each other's activations. Those barriers cost time only once the rings are full.
//
// A layer has five phases: norm and QKV linear; attention; dense linear and residual; norm, up
// linear and GELU; down linear and residual. Each block computes the same number of neighbouring
// outputs of a linear, and its 8 warps divide the inputs. Outputs are the rows of mma_m16n8k16 and
// tokens its columns. Blocks meet at a counter in device memory that only ever grows; the launch is
// cooperative, so that all blocks are sure to run.
//
// What follows a barrier is a chain of latencies that nothing hides once the rings are full, so it
// is kept short. Whatever does not depend on other blocks is loaded before the barrier: a norm's
// weight and bias, addresses of the layers (in shared memory), which cache blocks a warp attends to
// (in registers). All warps normalize a row together. Biases, residuals and addresses of results
// are loaded before the products that they follow.
//
// The order of sums does not depend on the tokens, but it differs from that of the kernels for one
// layer at a time.
#include "attention_decode.cuh"
#include "embedding.cuh"
#include "epilogue.cuh"
#include "linear.cuh"
#include "mma.cuh"

constexpr int WARPS = DECODE_WARPS;
constexpr int THREADS = WARPS * WARP;
constexpr int TOKENS = DECODE_TOKENS;
constexpr int CHUNK_ROWS = 16, CHUNK_ROW_BYTES = 128, CHUNK_BYTES = CHUNK_ROWS * CHUNK_ROW_BYTES;
constexpr int TILES = 4; // chunks side by side that are accumulated at the same time
constexpr int GROUP_ROWS = TILES * CHUNK_ROWS;
static_assert(CHUNK_BYTES == DECODE_CHUNK_BYTES && GROUP_ROWS == DECODE_GROUP_OUTPUTS,
              "as the host reserves it");
constexpr int SPLIT = DECODE_SPLIT;
constexpr int STEPS = SPLIT / CACHE_BLOCK / WARPS; // of a warp through a split
constexpr int LINEARS = DECODE_LINEARS;

// This block's outputs of a linear.
struct Share {
    uint32_t first, rows;
};
DEVICE Share share_of(uint32_t outputs) {
    uint32_t each = ((outputs + gridDim.x - 1) / gridDim.x + 3) / 4 * 4, first = blockIdx.x * each;
    return Share{first, first >= outputs ? 0 : outputs - first < each ? outputs - first : each};
}
DEVICE uint32_t inputs_of(const DecodeModel& m, uint32_t part) {
    return part == 3 ? 4 * m.width : m.width;
}
DEVICE uint32_t outputs_of(const DecodeModel& m, uint32_t part) {
    return part == 0 ? 3 * m.width : part == 2 ? 4 * m.width : m.width;
}

// A warp's stream of weights, in chunks of 16 outputs by 128 bytes of inputs, in the order in which
// the linears consume them: by groups of outputs, then by inputs, then by the outputs of a group.
// Every address follows from the one before by an addition, so that a chunk costs few instructions.
template <class W, int DEPTH>
struct Stream {
    static constexpr uint32_t INPUTS = CHUNK_ROW_BYTES / sizeof(W); // inputs in a chunk
    static constexpr uint32_t ROWS_AT_ONCE = WARP * 16 / CHUNK_ROW_BYTES;
    const DecodeModel& m;
    const DecodeLayer* layers; // in device memory, later in shared memory
    uint32_t number;           // number of the linear: layer * 4 + part
    // the next chunk to load
    const char* from; // this lane's 16 bytes of the first rows
    uint32_t left;    // rows of the group from this chunk on; 0 at the end of the stream
    uint32_t step;    // of the warp, through the inputs
    // of the linear
    uint32_t row_bytes, steps;
    uint32_t lane_steps; // steps in which this lane's inputs exist
    Share share;
    uint32_t group, group_rows; // the first row of the group, and how many it has
    int64_t next_step;          // bytes from the last chunk of a step to the first of the next step
    // The ring: where this lane reads from and writes to in the first chunk, and the bytes from
    // there to the next chunk. A chunk takes the place of the one that has just been read.
    const char* reads;
    char* writes;
    uint32_t slot;

    DEVICE_MEMBER Stream(const DecodeModel& m, char* ring)
        : m(m), layers(m.layers), number(0), slot(0) {
        // bank conflicts are avoided by exchanging the halves of odd rows
        uint32_t lane = lane_index(), row = lane / 8, column = lane % 8, g = lane / 4, t = lane % 4;
        writes = opaque_shared(ring + row * CHUNK_ROW_BYTES + (column ^ (row & 1) << 2) * 16);
        reads = opaque_shared(ring + g * CHUNK_ROW_BYTES + (t ^ (g & 1) << 2) * 16);
        begin_linear();
        UNROLL
        for (int i = 0; i < DEPTH; i++) {
            issue<true>();
            next_slot();
        }
    }
    DEVICE_MEMBER void next_slot() {
        slot = slot + CHUNK_BYTES == DEPTH * CHUNK_BYTES ? 0 : slot + CHUNK_BYTES;
    }

    // Goes on to linear `number`, or to the next one of which this warp has a part.
    DEVICE_MEMBER void begin_linear() {
        left = 0;
        for (; number < m.count * LINEARS; number++) {
            uint32_t part = number % LINEARS, inputs = inputs_of(m, part);
            share = share_of(outputs_of(m, part));
            uint32_t first = warp_index() * INPUTS,
                     first_of_lane = first + lane_index() % 8 * (16 / sizeof(W));
            if (share.rows == 0 || first >= inputs) continue;
            row_bytes = inputs * sizeof(W);
            steps = steps_from(first, inputs);
            lane_steps = steps_from(first_of_lane, inputs);
            group = 0;
            begin_group();
            return;
        }
    }
    DEVICE_MEMBER static uint32_t steps_from(uint32_t first, uint32_t inputs) {
        return first < inputs ? (inputs - first + WARPS * INPUTS - 1) / (WARPS * INPUTS) : 0;
    }
    DEVICE_MEMBER void begin_group() {
        const DecodeLinear& linear = layers[number / LINEARS].linears[number % LINEARS];
        from = static_cast<const char*>(linear.weight) +
               static_cast<size_t>(share.first + group + lane_index() / 8) * row_bytes +
               warp_index() * CHUNK_ROW_BYTES + lane_index() % 8 * 16;
        uint32_t rest = share.rows - group;
        group_rows = left = rest < GROUP_ROWS ? rest : GROUP_ROWS;
        next_step = static_cast<int64_t>(WARPS * CHUNK_ROW_BYTES) -
                    static_cast<int64_t>((left - 1) / CHUNK_ROWS * CHUNK_ROWS) * row_bytes;
        step = 0;
    }

    // Starts loading a chunk. Only the FIRST ones of the ring fill what does not exist with zeros:
    // later, weights of another chunk may stay there. They are finite, and the activations that
    // they meet are zeros, or their results are not used.
    template <bool FIRST>
    DEVICE_MEMBER void issue() {
        if (left > 0) {
            bool exists = step < lane_steps;
            const char* rows = from;
            UNROLL
            for (uint32_t i = 0; i < CHUNK_ROWS / ROWS_AT_ONCE; i++) {
                // shares are multiples of the rows at once
                bool valid = exists && i * ROWS_AT_ONCE < left;
                char* to = writes + slot + i * ROWS_AT_ONCE * CHUNK_ROW_BYTES;
                if (FIRST) {
                    cp_async(to, valid ? rows : from, valid);
                } else if (valid) {
                    cp_async(to, rows, true);
                }
                rows += static_cast<size_t>(ROWS_AT_ONCE) * row_bytes;
            }
            if (left > CHUNK_ROWS) {
                left -= CHUNK_ROWS;
                from = rows;
            } else if (++step < steps) {
                from += next_step;
                left = group_rows;
            } else {
                group += GROUP_ROWS;
                if (group < share.rows) {
                    begin_group();
                } else {
                    number++;
                    begin_linear();
                }
            }
        }
        cp_async_commit_group();
    }

    // Waits for the next chunk and reads 16 bytes each of rows lane / 4 and lane / 4 + 8, in both
    // halves of its inputs. Then starts loading another chunk in its place.
    DEVICE_MEMBER void consume(Pack16B (&rows)[2][2]) {
        cp_async_wait_group<DEPTH - 1>();
        warp_sync();
        const char *here = reads + slot,
                   *there = here + (lane_index() / 4 % 2 == 0 ? 64 : -64); // the other half
        UNROLL
        for (int i = 0; i < 2; i++) {
            rows[0][i] = load(reinterpret_cast<const Pack16B*>(here + 8 * i * CHUNK_ROW_BYTES));
            rows[1][i] = load(reinterpret_cast<const Pack16B*>(there + 8 * i * CHUNK_ROW_BYTES));
        }
        warp_sync(); // all lanes have read the chunk
        issue<false>();
        next_slot();
    }
};

// Waits for all blocks of the grid. What any of them wrote before can be read behind.
DEVICE void grid_sync(uint32_t* counter, uint32_t& arrived) {
    arrived += gridDim.x;
    block_sync();
    if (threadIdx.x == 0) {
        release_increment(counter);
        wait_for_counter(counter, arrived);
    }
    block_sync();
}

// Computes epilogue(x W^T) for this block's outputs. `x` has rows of `stride` elements; `sums` is
// THREADS * 2 * WARPS floats of shared memory.
template <class T, class W, int DEPTH>
DEVICE void linear_share(Stream<W, DEPTH>& stream, const DecodeModel& m, uint32_t part,
                         const float* scales, const T* x, uint32_t stride, uint32_t tokens,
                         float* sums, const EpilogueArgs& e) {
    using Operand = Weights<T, W>;
    constexpr uint32_t INPUTS = Stream<W, DEPTH>::INPUTS;
    // 16-byte vectors of activations that a lane needs for a chunk
    constexpr int VECTORS = INPUTS / 32;
    constexpr uint32_t AHEAD = 8 / VECTORS; // steps whose activations are in registers
    Share share = share_of(outputs_of(m, part));
    uint32_t inputs = inputs_of(m, part);
    uint32_t warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    uint32_t steps = stream.steps_from(warp * INPUTS, inputs);
    // A lane's inputs in each half of a chunk are contiguous, as its weights are. From `rest` on
    // there are none; lanes without a token have none at all.
    uint32_t first_input = warp * INPUTS + t * (INPUTS / 8);
    uint32_t rest = g < tokens && first_input < inputs ? inputs - first_input : 0;
    const T* first = x + static_cast<size_t>(g < tokens ? g : 0) * stride + first_input;
    // each thread finishes two neighbours of one token
    uint32_t token = threadIdx.x / (GROUP_ROWS / 2), pair = threadIdx.x % (GROUP_ROWS / 2) * 2;
    for (uint32_t group = 0; group < share.rows; group += GROUP_ROWS) {
        uint32_t left = share.rows - group, tiles = (left + CHUNK_ROWS - 1) / CHUNK_ROWS;
        uint32_t row = share.first + group + pair;
        bool finishes = token < tokens && pair < left;
        PairInputs finish = {};
        if (finishes) finish = load_pair_inputs<T>(e, token, row, true);
        if (group > 0) block_sync(); // the sums of the group before have been read
        // the halves of a chunk have sums of their own, so that fewer products wait for others
        float c[TILES][2][4] = {};
        Pack16B b[AHEAD][VECTORS];
        auto fetch = [&](Pack16B(&of_step)[VECTORS], uint32_t step) {
            UNROLL
            for (int i = 0; i < VECTORS; i++) {
                uint32_t k = step * WARPS * INPUTS + i / (VECTORS / 2) * (INPUTS / 2) +
                             i % (VECTORS / 2) * 8;
                of_step[i] = Pack16B{};
                if (k < rest) of_step[i] = load(reinterpret_cast<const Pack16B*>(first + k));
            }
        };
        UNROLL
        for (uint32_t a = 0; a < AHEAD; a++) fetch(b[a], a);
        for (uint32_t step = 0; step < steps; step += AHEAD) {
            UNROLL
            for (uint32_t a = 0; a < AHEAD; a++) {
                if (step + a >= steps) continue;
                UNROLL
                for (int tile = 0; tile < TILES; tile++) {
                    if (static_cast<uint32_t>(tile) >= tiles) continue;
                    Pack16B rows[2][2];
                    stream.consume(rows);
                    UNROLL
                    for (int s = 0; s < Operand::STEPS; s++) {
                        UNROLL
                        for (int half = 0; half < 2; half++) {
                            uint32_t upper[2], lower[2];
                            Operand::operand(upper, rows[half][0], s);
                            Operand::operand(lower, rows[half][1], s);
                            uint32_t a4[4] = {upper[0], lower[0], upper[1], lower[1]};
                            const Pack16B& vector = b[a][half * (VECTORS / 2) + s / 2];
                            uint32_t b2[2] = {vector.pairs[s % 2 * 2], vector.pairs[s % 2 * 2 + 1]};
                            mma_m16n8k16<T>(c[tile][half], a4, b2);
                        }
                    }
                }
                fetch(b[a], step + a + AHEAD);
            }
        }
        UNROLL
        for (int tile = 0; tile < TILES; tile++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                sums[(warp * TOKENS + 2 * t + i % 2) * GROUP_ROWS + tile * CHUNK_ROWS + i / 2 * 8 +
                     g] = c[tile][0][i] + c[tile][1][i];
            }
        }
        block_sync();
        // adds the warps' sums in order
        if (finishes) {
            float total[2] = {0, 0};
            UNROLL
            for (int i = 0; i < 2; i++) {
                for (int other = 0; other < WARPS; other++)
                    total[i] += sums[(other * TOKENS + token) * GROUP_ROWS + pair + i];
                if (scales && row + i < e.width) total[i] *= scales[row + i];
            }
            finish_pair<T>(e, finish, total[0], total[1], true);
        }
    }
}

// A block's part of attention: a head of a query over a split of its positions.
struct Unit {
    uint32_t head, query, split;
};
DEVICE Unit unit_of(const AttentionArgs& a, uint32_t number, uint32_t tokens) {
    return Unit{number % a.heads, number / a.heads % tokens, number / a.heads / tokens};
}

// `mine` is what the block knows of its first unit; units are further ones where there are more of
// them than blocks.
template <class T, int SIZE>
DEVICE void attention_share(const AttentionArgs& a, const DecodeQuery& mine, uint32_t tokens,
                            float* shared) {
    uint32_t units = tokens * a.heads * a.splits;
    for (uint32_t number = blockIdx.x; number < units; number += gridDim.x) {
        Unit unit = unit_of(a, number, tokens);
        DecodeQuery query = mine;
        if (number != blockIdx.x) {
            block_sync(); // the results of the unit before have been read
            query = load_decode_query<WARPS, SPLIT>(a, unit.head, unit.query, unit.split);
        }
        attention_decode<T, SIZE, WARPS, SPLIT>(a, query, unit.head, unit.query, unit.split,
                                                shared);
    }
}

// The attention arguments of a layer.
DEVICE AttentionArgs attention_of(const AttentionArgs& a, const DecodeStep& step, uint32_t layer) {
    AttentionArgs of = a;
    of.keys = static_cast<const char*>(a.keys) + layer * step.layer_bytes;
    of.values = static_cast<const char*>(a.values) + layer * step.layer_bytes;
    return of;
}

// Brings what layer `l` reads besides its weights to the L2 cache: biases, scales and norms, the
// first norm of the next layer, and the keys and values of this block's first unit.
DEVICE void prefetch_layer(const DecodeModel& m, const DecodeLayer* layers, uint32_t l,
                           const AttentionArgs& a, const DecodeQuery& query, const Unit& unit,
                           uint32_t head_size) {
    const DecodeLayer& layer = layers[l];
    uint32_t thread = threadIdx.x * gridDim.x + blockIdx.x, threads = THREADS * gridDim.x;
    for (uint32_t p = 0; p < LINEARS; p++) {
        const DecodeLinear& linear = layer.linears[p];
        prefetch_l2(linear.bias, outputs_of(m, p) * 4, thread, threads);
        if (linear.scales) prefetch_l2(linear.scales, outputs_of(m, p) * 4, thread, threads);
    }
    for (uint32_t i = 0; i < 2; i++) {
        prefetch_l2(layer.post_norm[i], m.width * 4, thread, threads);
        if (l + 1 < m.count) prefetch_l2(layers[l + 1].input_norm[i], m.width * 4, thread, threads);
    }
    uint32_t bytes = CACHE_BLOCK * head_size * 2;
    for (uint32_t i = 0; i < STEPS; i++) {
        uint32_t first = (unit.split * STEPS + i) * WARPS * CACHE_BLOCK;
        if (first + warp_index() * CACHE_BLOCK > query.position || unit.split >= a.splits) break;
        size_t at = (static_cast<size_t>(shuffle(query.blocks, i)) * a.heads + unit.head) * bytes;
        prefetch_l2(static_cast<const char*>(a.keys) + at, bytes, lane_index(), WARP);
        prefetch_l2(static_cast<const char*>(a.values) + at, bytes, lane_index(), WARP);
    }
}

// Shared memory holds the rings of the warps, then sums, normalized rows, and the layers'
// addresses.
template <class T, class W, int DEPTH>
DEVICE void decode_step(const DecodeModel& m, const DecodeStep& step, const TokenIds& ids,
                        const AttentionArgs& attention) {
    char* shared = shared_memory();
    float* sums = reinterpret_cast<float*>(shared + WARPS * DEPTH * CHUNK_BYTES);
    T* rows = reinterpret_cast<T*>(sums + WARPS * TOKENS * GROUP_ROWS);
    uint32_t width = m.width, stride = width + DECODE_PADDING;
    DecodeLayer* layers = reinterpret_cast<DecodeLayer*>(rows + TOKENS * stride);
    Stream<W, DEPTH> stream(m, shared + warp_index() * DEPTH * CHUNK_BYTES);
    for (uint32_t i = threadIdx.x; i < m.count * sizeof(DecodeLayer) / 16; i += THREADS) {
        reinterpret_cast<Pack16B*>(layers)[i] =
            load(reinterpret_cast<const Pack16B*>(m.layers) + i);
    }
    block_sync();
    stream.layers = layers;
    NormColumns<WARPS, DECODE_MAX_WIDTH / (THREADS * 4)> norm;
    norm.load(layers[0].input_norm[0], layers[0].input_norm[1], width);
    griddep_wait();
    uint32_t arrived = step.arrived, tokens = step.tokens, head_size = width / attention.heads;
    Unit unit = unit_of(attention, blockIdx.x, tokens);
    DecodeQuery query = {};
    if (blockIdx.x < tokens * attention.heads * attention.splits)
        query = load_decode_query<WARPS, SPLIT>(attention, unit.head, unit.query, unit.split);
    // tokens go to different blocks first, then to different warps
    for (uint32_t token = warp_index() * gridDim.x + blockIdx.x; token < tokens;
         token += THREADS / WARP * gridDim.x) {
        embed_row(step.x, ids, token, static_cast<const W*>(m.embedding), m.embedding_scales,
                  m.embedding_norm_weight, m.embedding_norm_bias, width, m.eps);
    }
    prefetch_layer(m, layers, 0, attention, query, unit, head_size);
    grid_sync(step.barrier, arrived);
    void* residual_normed = m.residual_post_norm ? step.normed : nullptr;
    // All linears go through one call, so that the code of a layer fits the instruction cache.
    for (uint32_t number = 0; number < m.count * LINEARS; number++) {
        uint32_t l = number / LINEARS, part = number % LINEARS;
        const DecodeLayer& layer = layers[l];
        EpilogueArgs e = {};
        if (part == 1) {
            AttentionArgs a = attention_of(attention, step, l);
            switch (head_size) {
            case 32: attention_share<T, 32>(a, query, tokens, sums); break;
            case 64: attention_share<T, 64>(a, query, tokens, sums); break;
            case 80: attention_share<T, 80>(a, query, tokens, sums); break;
            case 96: attention_share<T, 96>(a, query, tokens, sums); break;
            default: attention_share<T, 128>(a, query, tokens, sums); break;
            }
            grid_sync(step.barrier, arrived);
        }
        const T* x = rows;
        uint32_t x_stride = stride;
        if (part % 2 == 0) {
            const float* from = part == 0 ? step.x : step.x2;
            normalize_together<3>(
                norm, tokens, width, m.eps, reinterpret_cast<Float4*>(sums),
                [&](uint32_t token) { return from + static_cast<size_t>(token) * width; },
                [&](uint32_t token, uint32_t column, Float4 v) {
                    store_four(rows + static_cast<size_t>(token) * stride + column, v);
                    if (residual_normed && blockIdx.x == 0)
                        store_four(static_cast<T*>(residual_normed) +
                                       static_cast<size_t>(token) * width + column,
                                   v);
                });
            block_sync();
        } else {
            x = static_cast<const T*>(part == 1 ? step.attended : step.wide);
            x_stride = inputs_of(m, part);
            e.mode = EPILOGUE_RESIDUAL;
            e.residual = residual_normed ? residual_normed : part == 1 ? step.x : step.x2;
            e.half_residual = m.residual_post_norm;
            e.out = part == 1 ? step.x2 : step.x;
        }
        if (part == 0) {
            AttentionArgs a = attention_of(attention, step, l);
            e.mode = EPILOGUE_QKV;
            e.out = step.queries;
            e.keys = const_cast<void*>(a.keys);
            e.values = const_cast<void*>(a.values);
            e.slots = step.slots;
            e.heads = attention.heads;
            e.head_size = head_size;
        } else if (part == 2) {
            e.mode = EPILOGUE_GELU;
            e.out = step.wide;
        }
        e.bias = layer.linears[part].bias;
        e.width = outputs_of(m, part);
        linear_share<T, W, DEPTH>(stream, m, part, layer.linears[part].scales, x, x_stride, tokens,
                                  sums, e);
        if (number + 1 == m.count * LINEARS) break;
        if (part == 1) {
            norm.load(layer.post_norm[0], layer.post_norm[1], width);
        } else if (part == 3) {
            norm.load(layers[l + 1].input_norm[0], layers[l + 1].input_norm[1], width);
            prefetch_layer(m, layers, l + 1, attention_of(attention, step, l + 1), query, unit,
                           head_size);
        }
        grid_sync(step.barrier, arrived);
    }
}

#define DECODE_STEP(T, W, suffix, DEPTH)                                                           \
    KERNEL_ALONE(decode_step_##suffix##_##DEPTH, THREADS)(DecodeModel m, DecodeStep step,          \
                                                          TokenIds ids, AttentionArgs attention) { \
        decode_step<T, W, DEPTH>(m, step, ids, attention);                                         \
    }                                                                                              \
    EXPORT(decode_step_##suffix##_##DEPTH)
#define DECODE_STEP_ALL(DEPTH)                  \
    DECODE_STEP(bf16, bf16, bf16, DEPTH)        \
    DECODE_STEP(f16, f16, f16, DEPTH)           \
    DECODE_STEP(bf16, int8_t, bf16_int8, DEPTH) \
    DECODE_STEP(f16, int8_t, f16_int8, DEPTH)
DECODE_STEP_ALL(4)
DECODE_STEP_ALL(10)
