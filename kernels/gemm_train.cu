// GEMMs of training on every GPU since Ampere, with cp.async and mma; operands in 16 bits, sums in
// f32.
//
//   nt   C = A B^T    A [m, k], B [n, k]    logits
//   nn   C = A B      A [m, k], B [k, n]    gradients of inputs: dX = dY W
//   tn   C += A^T B   A [k, m], B [k, n]    gradients of weights: dW += dY^T X, k are the tokens
//
// FLOPs: 2 * m * n * k. Least bytes: both operands and the result once. L2 delivers (128 + 128) * k
// elements for a tile of 128 * 128 results, which is 64 FLOPs for each byte.
// A block computes a tile in 8 warps of 64 by 32. The next two slices of 64 inner elements are
// copied during the computation of this one. Operands lie in shared memory as they lie in memory,
// and those whose inner dimension goes through the rows are transposed by ldmatrix on their way to
// the registers. The sums of A's rows for a bias are another product, by ones, of the operands that
// a warp has anyway.
// Where there are fewer tiles than multiprocessors, blocks take parts of the inner dimension, and
// gemm_combine adds these in their order: sums depend on the shapes alone.
#include "epilogue.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "threads.cuh"
#include "train_rows.cuh"

constexpr int THREADS = GEMM_TRAIN_THREADS;
constexpr int TILE = GEMM_TRAIN_TILE;
constexpr int SLICE = GEMM_TRAIN_SLICE;
constexpr int STAGES = GEMM_TRAIN_STAGES;
constexpr int WARP_M = 64, WARP_N = 32;
constexpr int OPERAND_BYTES = TILE * SLICE * 2, STAGE_BYTES = 2 * OPERAND_BYTES;
constexpr uint32_t GROUP = 8;        // tiles along m that blocks in work at the same time share
constexpr int SUM_STRIDE = TILE + 8; // the padding avoids bank conflicts
static_assert(TILE * SUM_STRIDE * 4 <= STAGES * STAGE_BYTES, "room for the sums");

// One operand. OUTER: its rows are m or n and hold the inner dimension, [outer, k]; otherwise its
// rows are the inner dimension, [k, outer].
template <bool OUTER>
struct Operand {
    const bf16* at;
    uint32_t outer, inner, stride; // how many there are of each, and elements from row to row
    uint32_t first;                // of the tile

    // Where the 16-byte chunk `c` of row `r` lies in a slice. The chunks are permuted so that
    // eight rows of a column of chunks lie in different banks.
    static DEVICE_MEMBER int chunk_at(int r, int c) {
        return r * (OUTER ? SLICE : TILE) * 2 + ((c ^ (r & 7)) << 4);
    }
    // Starts the copies of a slice; what does not exist becomes zeros.
    DEVICE_MEMBER void load(char* to, uint32_t k) const {
        constexpr int CHUNKS = (OUTER ? SLICE : TILE) / 8, ROWS = OUTER ? TILE : SLICE;
        UNROLL
        for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
            int chunk = threadIdx.x + i * THREADS, r = chunk / CHUNKS, c = chunk % CHUNKS;
            uint32_t row = (OUTER ? first : k) + r, column = (OUTER ? k : first) + c * 8;
            bool valid = row < (OUTER ? outer : inner) && column < (OUTER ? inner : outer);
            cp_async(to + chunk_at(r, c),
                     valid ? at + static_cast<size_t>(row) * stride + column : at, valid);
        }
    }
    // Four matrices of 8 outer by 8 inner elements as operands: number j begins at outer element
    // `start` + 8 * (j / 2) if `by_inner`, or + 8 * (j % 2), and at inner element 16 * `step` + 8 *
    // the other one.
    static DEVICE_MEMBER void matrices(uint32_t (&out)[4], const char* slice, int start, int step,
                                       bool by_inner) {
        int lane = lane_index(), j = lane / 8, r = lane % 8;
        int o = by_inner ? j / 2 : j % 2, i = by_inner ? j % 2 : j / 2;
        if (OUTER) {
            ldmatrix_x4(out, slice + chunk_at(start + o * 8 + r, step * 2 + i));
        } else {
            ldmatrix_x4_trans(out, slice + chunk_at(step * 16 + i * 8 + r, start / 8 + o));
        }
    }
};

// A warp's sums, ordered as by mma_m16n8k16; those of the products by ones; and where the warp's
// begin in the tile.
struct WarpSums {
    float c[4][4][4] = {};
    float ones[4][4] = {};
    int m0, n0;
};

template <bool A_OUTER, bool B_OUTER>
DEVICE void multiply_slice(WarpSums& sums, const char* stage, bool with_ones) {
    UNROLL
    for (int step = 0; step < SLICE / 16; step++) {
        uint32_t a[4][4], b[4][2];
        UNROLL
        for (int m = 0; m < 4; m++)
            Operand<A_OUTER>::matrices(a[m], stage, sums.m0 + m * 16, step, false);
        UNROLL
        for (int n = 0; n < 2; n++) {
            uint32_t four[4];
            Operand<B_OUTER>::matrices(four, stage + OPERAND_BYTES, sums.n0 + n * 16, step, true);
            UNROLL
            for (int i = 0; i < 4; i++) b[2 * n + i / 2][i % 2] = four[i];
        }
        UNROLL
        for (int m = 0; m < 4; m++) {
            UNROLL
            for (int n = 0; n < 4; n++) mma_m16n8k16<bf16>(sums.c[m][n], a[m], b[n]);
        }
        if (with_ones) {
            uint32_t ones = pack<bf16>(1, 1), both[2] = {ones, ones};
            UNROLL
            for (int m = 0; m < 4; m++) mma_m16n8k16<bf16>(sums.ones[m], a[m], both);
        }
    }
}

template <bool A_OUTER, bool B_OUTER>
DEVICE WarpSums multiply(const GemmArgs& g, const Operand<A_OUTER>& a, const Operand<B_OUTER>& b,
                         bool with_ones) {
    char* shared = shared_memory();
    uint32_t slices = (g.k + SLICE - 1) / SLICE, begin = blockIdx.y * g.part_slices;
    uint32_t end = begin + g.part_slices < slices ? begin + g.part_slices : slices;
    auto load = [&](uint32_t s) {
        char* stage = shared + s % STAGES * STAGE_BYTES;
        if (s < end) {
            a.load(stage, s * SLICE);
            b.load(stage + OPERAND_BYTES, s * SLICE);
        }
        cp_async_commit_group();
    };
    UNROLL
    for (int s = 0; s < STAGES - 1; s++) load(begin + s);
    WarpSums sums;
    sums.m0 = warp_index() / 4 * WARP_M;
    sums.n0 = warp_index() % 4 * WARP_N;
    for (uint32_t s = begin; s < end; s++) {
        cp_async_wait_group<STAGES - 2>();
        block_sync(); // this slice has arrived, and all warps have read the one before it
        load(s + STAGES - 1);
        multiply_slice<A_OUTER, B_OUTER>(sums, shared + s % STAGES * STAGE_BYTES,
                                         with_ones && sums.n0 == 0);
    }
    cp_async_wait_group<0>();
    block_sync(); // all warps have read the last slice
    return sums;
}

// Writes eight neighbouring results of a row, or adds them to what is there. Those beyond n are
// zeros, and there is room for them.
DEVICE void finish_eight(const GemmArgs& g, uint32_t row, uint32_t column, float (&v)[8]) {
    size_t at = static_cast<size_t>(row) * g.c_stride + column;
    if (g.mode == GEMM_ADD) {
        float* c = static_cast<float*>(g.c) + at;
        UNROLL
        for (int i = 0; i < 8; i += 4) {
            if (column + i >= g.n) break;
            Float4 sum = take_four(c + i);
            UNROLL
            for (int j = 0; j < 4; j++) sum.v[j] += v[i + j];
            put_four(c + i, sum);
        }
        return;
    }
    if (g.before_gelu) {
        const bf16* u = static_cast<const bf16*>(g.before_gelu) + at;
        Pack16B eight = *reinterpret_cast<const Pack16B*>(u);
        UNROLL
        for (int i = 0; i < 8; i++) {
            uint32_t pair = eight.pairs[i / 2];
            v[i] *= gelu_gradient(i % 2 ? high<bf16>(pair) : low<bf16>(pair));
        }
    }
    Pack16B out;
    UNROLL
    for (int i = 0; i < 4; i++) out.pairs[i] = pack<bf16>(v[2 * i], v[2 * i + 1]);
    *reinterpret_cast<Pack16B*>(static_cast<bf16*>(g.c) + at) = out;
}

// Where part `part` of row `row` begins among the partial sums.
DEVICE float* partial_row(const GemmArgs& g, uint32_t part, uint32_t row) {
    uint32_t width = (g.n + 7) / 8 * 8;
    return g.partials + (static_cast<size_t>(part) * g.m + row) * width;
}
// Where the parts of the row sums begin.
DEVICE float* partial_row_sums(const GemmArgs& g, uint32_t part) {
    return partial_row(g, g.parts, 0) + static_cast<size_t>(part) * g.m;
}

// Leaves the tile in shared memory, so that whole lines of results are written.
DEVICE void stage_sums(const WarpSums& sums) {
    float* staged = reinterpret_cast<float*>(shared_memory());
    int g = lane_index() / 4, t = lane_index() % 4;
    UNROLL
    for (int m = 0; m < 4; m++) {
        UNROLL
        for (int n = 0; n < 4; n++) {
            UNROLL
            for (int below = 0; below < 2; below++) {
                float* to = staged + (sums.m0 + m * 16 + below * 8 + g) * SUM_STRIDE + sums.n0 +
                            n * 8 + 2 * t;
                const float* pair = sums.c[m][n] + 2 * below;
                *reinterpret_cast<Float2*>(to) = Float2{{pair[0], pair[1]}};
            }
        }
    }
    block_sync();
}

DEVICE void write_row_sums(const GemmArgs& g, const WarpSums& sums, uint32_t first) {
    int lane = lane_index();
    if (lane % 4 != 0) return;
    UNROLL
    for (int m = 0; m < 4; m++) {
        UNROLL
        for (int below = 0; below < 2; below++) {
            uint32_t row = first + sums.m0 + m * 16 + below * 8 + lane / 4;
            if (row >= g.m) continue;
            float sum = sums.ones[m][2 * below];
            if (g.mode == GEMM_PARTIAL) {
                partial_row_sums(g, blockIdx.y)[row] = sum;
            } else {
                g.row_sums[row] += sum;
            }
        }
    }
}

template <bool A_OUTER, bool B_OUTER>
DEVICE void gemm(const GemmArgs& g) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t rows = (g.m + TILE - 1) / TILE, columns = (g.n + TILE - 1) / TILE;
    uint32_t above = blockIdx.x / (GROUP * columns) * GROUP;
    uint32_t height = rows - above < GROUP ? rows - above : GROUP;
    uint32_t within = blockIdx.x - above * columns;
    uint32_t row = (above + within % height) * TILE, column = within / height * TILE;
    Operand<A_OUTER> a = {static_cast<const bf16*>(g.a), g.m, g.k, g.a_stride, row};
    Operand<B_OUTER> b = {static_cast<const bf16*>(g.b), g.n, g.k, g.b_stride, column};
    bool with_ones = g.row_sums && column == 0;
    WarpSums sums = multiply(g, a, b, with_ones);
    if (with_ones && sums.n0 == 0) write_row_sums(g, sums, row);
    stage_sums(sums);
    const float* staged = reinterpret_cast<const float*>(shared_memory());
    for (uint32_t i = threadIdx.x; i < TILE * TILE / 8; i += THREADS) {
        uint32_t r = i / (TILE / 8), c = i % (TILE / 8) * 8;
        if (row + r >= g.m || column + c >= g.n) continue;
        Float4 four[2] = {take_four(staged + r * SUM_STRIDE + c),
                          take_four(staged + r * SUM_STRIDE + c + 4)};
        if (g.mode == GEMM_PARTIAL) {
            float* to = partial_row(g, blockIdx.y, row + r) + column + c;
            put_four(to, four[0]);
            put_four(to + 4, four[1]);
            continue;
        }
        float v[8];
        UNROLL
        for (int j = 0; j < 8; j++) v[j] = four[j / 4].v[j % 4];
        finish_eight(g, row + r, column + c, v);
    }
}

#define GEMM(layout, A_OUTER, B_OUTER)                                               \
    KERNEL(gemm_##layout##_bf16, THREADS)(GemmArgs g) { gemm<A_OUTER, B_OUTER>(g); } \
    EXPORT(gemm_##layout##_bf16)
GEMM(nt, true, true)
GEMM(nn, true, false)
GEMM(tn, false, false)

// Adds the shares of all parts in their order. A thread takes eight neighbours of a row; `mode` is
// what becomes of the whole sums.
KERNEL(gemm_combine_bf16, THREADS)(GemmArgs g) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t chunks = (g.n + 7) / 8;
    uint64_t i = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < static_cast<uint64_t>(g.m) * chunks) {
        uint32_t row = i / chunks, column = i % chunks * 8;
        float v[8] = {};
        for (uint32_t part = 0; part < g.parts; part++) {
            const float* from = partial_row(g, part, row) + column;
            Float4 four[2] = {take_four(from), take_four(from + 4)};
            UNROLL
            for (int j = 0; j < 8; j++) v[j] += four[j / 4].v[j % 4];
        }
        finish_eight(g, row, column, v);
    }
    if (g.row_sums && i < g.m) {
        float sum = 0;
        for (uint32_t part = 0; part < g.parts; part++) sum += partial_row_sums(g, part)[i];
        g.row_sums[i] += sum;
    }
}
EXPORT(gemm_combine_bf16)
