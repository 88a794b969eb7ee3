// All layers of a decoding step for at most 8 sequences, in one launch (after the Megakernels
// design, Hazy Research 2025).
//
// Least bytes: the weights. Launched layer by layer, each of some hundred kernels begins with empty
// hands: its first weights take a trip to memory while nothing is computed, and the last block of
// the one before is waited for. Here one block stays on each multiprocessor, and its share of all
// weights of all layers is one stream that never stops: every warp keeps DEPTH pieces of 2 KB on
// their way into a ring of its own in shared memory (cp.async), across the barriers at which the
// blocks wait for each other's activations; those barriers cost time only once the ring has run
// full.
//
//   A phase is a product or attention; a layer has five: norm + queries, keys, values; attention;
//   dense + residual; norm + up + GELU; down + residual. Block b computes the same count of
//   neighbouring outputs in each product; its 8 warps divide the inputs. Outputs are the rows of
//   the tensor cores' instruction and tokens its columns. Blocks meet at a counter in device memory
//   that only ever grows: the launch is cooperative, so that all of them are alive.
//
// Sums are made in an order that does not depend on the tokens, but it is not that of the kernels
// for one layer at a time.
#include "attention_decode.cuh"
#include "embedding.cuh"
#include "epilogue.cuh"
#include "linear.cuh"
#include "tensor_core.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int TOKENS = 8;
constexpr int PIECE_ROWS = 16, PIECE_ROW_BYTES = 128, PIECE_BYTES = PIECE_ROWS * PIECE_ROW_BYTES;
constexpr int TILES = 4; // pieces side by side whose sums are in registers at once
constexpr int GROUP_ROWS = TILES * PIECE_ROWS;
constexpr int SPLIT = WARPS * BLOCK; // positions that a block attends to at once
constexpr int STRIDE_MORE = 32;      // elements between staged rows, against bank conflicts
constexpr int PARTS = 4;             // products of a layer

// Laid out as in src/ops/cuda/persistent.rs.
struct Product {
    const void* weight; // [outputs, inputs]
    const float *scales, *bias;
};
struct Layer {
    Product products[PARTS];                   // queries, keys, values; dense; up; down
    const float *input_norm[2], *post_norm[2]; // gain and shift
};
struct Model {
    const Layer* layers;
    const void* embedding;
    const float *embedding_scales, *embedding_norm, *embedding_shift;
    uint32_t count, width;
    float eps;
    uint32_t residual_post_norm;
};
struct Step {
    float *x, *x2;
    void *normed, *queries, *attended, *wide;
    const uint32_t* slots;
    uint32_t* barrier;        // how often blocks have come to a barrier
    uint64_t layer_bytes;     // of the cache
    uint32_t tokens, arrived; // and where the barrier stands as this launch begins
};

// This block's outputs of a product.
struct Share {
    uint32_t first, rows;
};
DEVICE Share share_of(uint32_t outputs) {
    uint32_t each = ((outputs + gridDim.x - 1) / gridDim.x + 3) / 4 * 4, first = blockIdx.x * each;
    return Share{first, first >= outputs ? 0 : outputs - first < each ? outputs - first : each};
}
DEVICE uint32_t inputs_of(const Model& m, uint32_t part) {
    return part == 3 ? 4 * m.width : m.width;
}
DEVICE uint32_t outputs_of(const Model& m, uint32_t part) {
    return part == 0 ? 3 * m.width : part == 2 ? 4 * m.width : m.width;
}

// A warp's stream of weights: pieces of 16 outputs by 128 bytes of inputs, in the order in which
// the products take them.
template <class W, int DEPTH>
struct Stream {
    static constexpr uint32_t INPUTS = PIECE_ROW_BYTES / sizeof(W); // of a piece
    const Model& m;
    char* ring;
    // the next piece to ask for
    const W* weight;
    uint32_t inputs;
    Share share;
    uint32_t number; // of the product: layer * 4 + part
    uint32_t group, k, tile;
    uint32_t asked, taken;

    DEVICE_MEMBER Stream(const Model& m, char* ring)
        : m(m), ring(ring), number(0), asked(0), taken(0) {
        open();
        for (int i = 0; i < DEPTH; i++) ask();
    }

    // Goes to the next product in which this warp has anything to do.
    DEVICE_MEMBER void open() {
        for (; number < m.count * PARTS; number++) {
            inputs = inputs_of(m, number % PARTS);
            share = share_of(outputs_of(m, number % PARTS));
            if (share.rows > 0 && warp_index() * INPUTS < inputs) break;
        }
        if (number < m.count * PARTS)
            weight =
                static_cast<const W*>(m.layers[number / PARTS].products[number % PARTS].weight);
        group = tile = 0;
        k = warp_index() * INPUTS;
    }

    DEVICE_MEMBER void ask() {
        if (number < m.count * PARTS) {
            char* to = ring + asked % DEPTH * PIECE_BYTES;
            UNROLL
            for (int i = 0; i < PIECE_BYTES / 16 / WARP; i++) {
                uint32_t row = i * 4 + lane_index() / 8, c = lane_index() % 8,
                         at = k + c * (16 / sizeof(W));
                uint32_t r = group * GROUP_ROWS + tile * PIECE_ROWS + row;
                bool valid = r < share.rows && at < inputs;
                copy_async(to + row * PIECE_ROW_BYTES + (c ^ (row & 1) << 2) * 16,
                           valid ? weight + static_cast<size_t>(share.first + r) * inputs + at
                                 : weight,
                           valid);
            }
            uint32_t left = share.rows - group * GROUP_ROWS;
            if (++tile >= TILES || tile * PIECE_ROWS >= left) {
                tile = 0;
                k += WARPS * INPUTS;
                if (k >= inputs) {
                    k = warp_index() * INPUTS;
                    if (++group * GROUP_ROWS >= share.rows) {
                        number++;
                        open();
                    }
                }
            }
        }
        asked++;
        copy_commit();
    }

    // Waits for the next piece: 16 bytes each of rows lane / 4 and lane / 4 + 8, in both halves of
    // its inputs. Asks for another one in its place.
    DEVICE_MEMBER void take(Eight (&rows)[2][2]) {
        copy_wait<DEPTH - 1>();
        sync_warp();
        const char* from = ring + taken % DEPTH * PIECE_BYTES;
        int g = lane_index() / 4, t = lane_index() % 4;
        UNROLL
        for (int half = 0; half < 2; half++) {
            UNROLL
            for (int i = 0; i < 2; i++) {
                rows[half][i] = load(reinterpret_cast<const Eight*>(
                    from + (g + 8 * i) * PIECE_ROW_BYTES + ((half * 4 + t) ^ (g & 1) << 2) * 16));
            }
        }
        taken++;
        sync_warp(); // all lanes have what they need of it
        ask();
    }
};

// Waits for all blocks. What any of them wrote may be read afterwards.
DEVICE void sync_grid(uint32_t* counter, uint32_t& arrived) {
    arrived += gridDim.x;
    sync_block();
    if (threadIdx.x == 0) {
        count_arrival(counter);
        wait_for_count(counter, arrived);
    }
    sync_block();
}

// epilogue(x W^T) of this block's outputs; `x` are rows of `stride` elements. `sums`: THREADS * 2 *
// WARPS floats of shared memory.
template <class T, class W, int DEPTH>
DEVICE void multiply_share(Stream<W, DEPTH>& stream, const Model& m, uint32_t part,
                           const float* scales, const T* x, uint32_t stride, uint32_t tokens,
                           float* sums, const Epilogue& e) {
    using Operand = Weights<T, W>;
    constexpr uint32_t INPUTS = Stream<W, DEPTH>::INPUTS;
    constexpr int EIGHTS = INPUTS / 32; // of a lane's inputs in a piece
    constexpr int AHEAD = 8 / EIGHTS;   // pieces whose activations are asked for together
    Share share = share_of(outputs_of(m, part));
    uint32_t inputs = inputs_of(m, part);
    int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    for (uint32_t group = 0; group * GROUP_ROWS < share.rows; group++) {
        uint32_t left = share.rows - group * GROUP_ROWS,
                 tiles = (left + PIECE_ROWS - 1) / PIECE_ROWS;
        float c[TILES][4] = {};
        for (uint32_t k0 = warp * INPUTS; k0 < inputs; k0 += AHEAD * WARPS * INPUTS) {
            Eight b[AHEAD][EIGHTS];
            UNROLL
            for (int a = 0; a < AHEAD; a++) {
                UNROLL
                for (int i = 0; i < EIGHTS; i++) {
                    // a lane's inputs in each half of a piece lie side by side, as its weights do
                    uint32_t k = k0 + a * WARPS * INPUTS + i / (EIGHTS / 2) * (INPUTS / 2) +
                                 t * (INPUTS / 8) + i % (EIGHTS / 2) * 8;
                    b[a][i] = Eight{};
                    if (static_cast<uint32_t>(g) < tokens && k < inputs) {
                        b[a][i] = load(reinterpret_cast<const Eight*>(
                            x + static_cast<size_t>(g) * stride + k));
                    }
                }
            }
            UNROLL
            for (int a = 0; a < AHEAD; a++) {
                if (k0 + a * WARPS * INPUTS >= inputs) continue;
                UNROLL
                for (int tile = 0; tile < TILES; tile++) {
                    if (static_cast<uint32_t>(tile) >= tiles) continue;
                    Eight rows[2][2];
                    stream.take(rows);
                    UNROLL
                    for (int half = 0; half < 2; half++) {
                        UNROLL
                        for (int s = 0; s < Operand::STEPS; s++) {
                            uint32_t upper[2], lower[2];
                            Operand::operand(upper, rows[half][0], s);
                            Operand::operand(lower, rows[half][1], s);
                            uint32_t a4[4] = {upper[0], lower[0], upper[1], lower[1]};
                            const Eight& eight = b[a][half * (EIGHTS / 2) + s / 2];
                            uint32_t b2[2] = {eight.pairs[s % 2 * 2], eight.pairs[s % 2 * 2 + 1]};
                            multiply<T>(c[tile], a4, b2);
                        }
                    }
                }
            }
        }
        UNROLL
        for (int tile = 0; tile < TILES; tile++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                sums[(warp * TOKENS + 2 * t + i % 2) * GROUP_ROWS + tile * PIECE_ROWS + i / 2 * 8 +
                     g] = c[tile][i];
            }
        }
        sync_block();
        // the warps' sums, in order; two neighbours of a token for each thread
        uint32_t token = threadIdx.x / (GROUP_ROWS / 2), pair = threadIdx.x % (GROUP_ROWS / 2) * 2;
        if (token < tokens && pair < left) {
            float total[2] = {0, 0};
            uint32_t row = share.first + group * GROUP_ROWS + pair;
            UNROLL
            for (int i = 0; i < 2; i++) {
                for (int other = 0; other < WARPS; other++)
                    total[i] += sums[(other * TOKENS + token) * GROUP_ROWS + pair + i];
                if (scales && row + i < e.width) total[i] *= scales[row + i];
            }
            finish_pair<T>(e, token, row, total[0], total[1], true);
        }
        sync_block();
    }
}

template <class T, int SIZE>
DEVICE void attend_share(const Attention& a, uint32_t tokens, float* shared) {
    uint32_t units = tokens * a.heads * a.splits;
    for (uint32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
        attend<T, SIZE, WARPS, SPLIT>(a, unit % a.heads, unit / a.heads % tokens,
                                      unit / a.heads / tokens, shared);
        sync_block();
    }
}

// Shared memory: the warps' rings; sums; normalized rows.
template <class T, class W, int DEPTH>
DEVICE void decode_step(const Model& m, const Step& step, const Ids& ids,
                        const Attention& attention) {
    char* shared = shared_memory();
    float* sums = reinterpret_cast<float*>(shared + WARPS * DEPTH * PIECE_BYTES);
    T* rows = reinterpret_cast<T*>(sums + WARPS * TOKENS * GROUP_ROWS);
    Stream<W, DEPTH> stream(m, shared + warp_index() * DEPTH * PIECE_BYTES);
    wait_for_earlier_kernels();
    uint32_t arrived = step.arrived, tokens = step.tokens, width = m.width,
             stride = width + STRIDE_MORE;
    // a token for each block first, then for their other warps
    for (uint32_t token = warp_index() * gridDim.x + blockIdx.x; token < tokens;
         token += THREADS / WARP * gridDim.x) {
        embed_row(step.x, ids, token, static_cast<const W*>(m.embedding), m.embedding_scales,
                  m.embedding_norm, m.embedding_shift, width, m.eps);
    }
    sync_grid(step.barrier, arrived);
    uint32_t head_size = width / attention.heads;
    void* residual_normed = m.residual_post_norm ? step.normed : nullptr;
    // all products go through one place: the code of a layer fits the processors' instruction
    // caches
    for (uint32_t number = 0; number < m.count * PARTS; number++) {
        uint32_t l = number / PARTS, part = number % PARTS;
        const Layer& layer = m.layers[l];
        Epilogue e = {};
        if (part == 0) {
            // what the layer reads beside its weights, and the first norm of the next
            uint32_t thread = threadIdx.x * gridDim.x + blockIdx.x, threads = THREADS * gridDim.x;
            for (uint32_t p = 0; p < PARTS; p++) {
                const Product& product = layer.products[p];
                prefetch(product.bias, outputs_of(m, p) * 4, thread, threads);
                if (product.scales) prefetch(product.scales, outputs_of(m, p) * 4, thread, threads);
            }
            for (uint32_t i = 0; i < 2; i++) {
                prefetch(layer.post_norm[i], width * 4, thread, threads);
                if (l + 1 < m.count)
                    prefetch(m.layers[l + 1].input_norm[i], width * 4, thread, threads);
            }
        }
        if (part == 1) {
            Attention a = attention;
            a.keys = static_cast<const char*>(attention.keys) + l * step.layer_bytes;
            a.values = static_cast<const char*>(attention.values) + l * step.layer_bytes;
            switch (head_size) {
            case 32: attend_share<T, 32>(a, tokens, sums); break;
            case 64: attend_share<T, 64>(a, tokens, sums); break;
            case 80: attend_share<T, 80>(a, tokens, sums); break;
            case 96: attend_share<T, 96>(a, tokens, sums); break;
            default: attend_share<T, 128>(a, tokens, sums); break;
            }
            sync_grid(step.barrier, arrived);
        }
        const T* x = rows;
        uint32_t x_stride = stride;
        if (part % 2 == 0) {
            const float* const* norm = part == 0 ? layer.input_norm : layer.post_norm;
            Input in = {part == 0 ? step.x : step.x2,
                        norm[0],
                        norm[1],
                        residual_normed,
                        m.eps,
                        tokens,
                        width,
                        0};
            stage_normalized<T, WARPS>(in, rows, stride);
        } else {
            x = static_cast<const T*>(part == 1 ? step.attended : step.wide);
            x_stride = inputs_of(m, part);
            e.mode = RESIDUAL;
            e.residual = residual_normed ? residual_normed : part == 1 ? step.x : step.x2;
            e.narrow_residual = m.residual_post_norm;
            e.out = part == 1 ? step.x2 : step.x;
        }
        if (part == 0) {
            e.mode = QKV;
            e.out = step.queries;
            e.keys =
                const_cast<char*>(static_cast<const char*>(attention.keys) + l * step.layer_bytes);
            e.values = const_cast<char*>(static_cast<const char*>(attention.values) +
                                         l * step.layer_bytes);
            e.slots = step.slots;
            e.heads = attention.heads;
            e.head_size = head_size;
        } else if (part == 2) {
            e.mode = GELU;
            e.out = step.wide;
        }
        e.bias = layer.products[part].bias;
        e.width = outputs_of(m, part);
        multiply_share<T, W, DEPTH>(stream, m, part, layer.products[part].scales, x, x_stride,
                                    tokens, sums, e);
        if (number + 1 < m.count * PARTS) sync_grid(step.barrier, arrived);
    }
}

#define DECODE_STEP(T, W, suffix, DEPTH)                                               \
    KERNEL_ALONE(decode_step_##suffix##_##DEPTH, THREADS)(Model m, Step step, Ids ids, \
                                                          Attention attention) {       \
        decode_step<T, W, DEPTH>(m, step, ids, attention);                             \
    }                                                                                  \
    EXPORT(decode_step_##suffix##_##DEPTH)
#define DECODE_STEP_ALL(DEPTH)                  \
    DECODE_STEP(bf16, bf16, bf16, DEPTH)        \
    DECODE_STEP(f16, f16, f16, DEPTH)           \
    DECODE_STEP(bf16, int8_t, bf16_int8, DEPTH) \
    DECODE_STEP(f16, int8_t, f16_int8, DEPTH)
DECODE_STEP_ALL(4)
DECODE_STEP_ALL(10)
