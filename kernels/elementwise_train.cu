// What training does element by element or row by row between its larger operations: limited by
// memory, each element once.
//
// Blocks take ELEMENTWISE_BLOCK elements, eight neighbours a thread; numbers of elements are
// multiples of 8.
#include "epilogue.cuh"
#include "threads.cuh"
#include "train_rows.cuh"

// The first of a thread's eight elements; false if there are none.
DEVICE bool first_of_eight(uint64_t count, uint64_t& first) {
    first = static_cast<uint64_t>(blockIdx.x) * ELEMENTWISE_BLOCK + threadIdx.x * 8;
    return first < count;
}

// y = gelu(x)
KERNEL(gelu_bf16, TRAIN_THREADS)(bf16* y, const bf16* x, uint64_t count) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t i;
    if (!first_of_eight(count, i)) return;
    Pack16B v = *reinterpret_cast<const Pack16B*>(x + i);
    UNROLL
    for (int j = 0; j < 4; j++)
        v.pairs[j] = pack<bf16>(gelu(low<bf16>(v.pairs[j])), gelu(high<bf16>(v.pairs[j])));
    *reinterpret_cast<Pack16B*>(y + i) = v;
}
EXPORT(gelu_bf16)

// y = x, rounded to 16 bits
KERNEL(narrow_bf16, TRAIN_THREADS)(bf16* y, const float* x, uint64_t count) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t i;
    if (!first_of_eight(count, i)) return;
    put_four(y + i, take_four(x + i));
    put_four(y + i + 4, take_four(x + i + 4));
}
EXPORT(narrow_bf16)

// y += x
KERNEL(add_bf16, TRAIN_THREADS)(bf16* y, const float* x, uint64_t count) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t first;
    if (!first_of_eight(count, first)) return;
    UNROLL
    for (int part = 0; part < 8; part += 4) {
        Float4 a = take_four(y + first + part), b = take_four(x + first + part);
        UNROLL
        for (int j = 0; j < 4; j++) a.v[j] += b.v[j];
        put_four(y + first + part, a);
    }
}
EXPORT(add_bf16)

// y += x, both in 16 bits
KERNEL(add_half_bf16, TRAIN_THREADS)(bf16* y, const bf16* x, uint64_t count) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t first;
    if (!first_of_eight(count, first)) return;
    Pack16B a = *reinterpret_cast<const Pack16B*>(y + first);
    Pack16B b = *reinterpret_cast<const Pack16B*>(x + first);
    UNROLL
    for (int j = 0; j < 4; j++)
        a.pairs[j] = pack<bf16>(low<bf16>(a.pairs[j]) + low<bf16>(b.pairs[j]),
                                high<bf16>(a.pairs[j]) + high<bf16>(b.pairs[j]));
    *reinterpret_cast<Pack16B*>(y + first) = a;
}
EXPORT(add_half_bf16)

// y = max(x, 0)
KERNEL(relu_bf16, TRAIN_THREADS)(bf16* y, const bf16* x, uint64_t count) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t i;
    if (!first_of_eight(count, i)) return;
    Pack16B v = *reinterpret_cast<const Pack16B*>(x + i);
    UNROLL
    for (int j = 0; j < 4; j++)
        v.pairs[j] =
            pack<bf16>(fmaxf(low<bf16>(v.pairs[j]), 0.0f), fmaxf(high<bf16>(v.pairs[j]), 0.0f));
    *reinterpret_cast<Pack16B*>(y + i) = v;
}
EXPORT(relu_bf16)

// Exchanges what is in x and y, in f32, of any number.
KERNEL(swap, TRAIN_THREADS)(float* x, float* y, uint64_t count) {
    griddep_launch_dependents();
    griddep_wait();
    uint64_t first;
    if (!first_of_eight(count, first)) return;
    for (uint64_t i = first; i < first + 8 && i < count; i++) {
        float kept = x[i];
        x[i] = y[i];
        y[i] = kept;
    }
}
EXPORT(swap)

// Row r of y is row rows[r] of x, or zeros where that is ABSENT. A warp takes a row.
KERNEL(select_rows_bf16, TRAIN_THREADS)
(bf16* y, const bf16* x, const uint32_t* rows, uint32_t count, uint32_t width) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t r = blockIdx.x * (TRAIN_THREADS / WARP) + warp_index();
    if (r >= count) return;
    uint32_t from = rows[r];
    for (uint32_t i = lane_index() * 8; i < width; i += WARP * 8) {
        Pack16B v = {};
        if (from != ABSENT)
            v = *reinterpret_cast<const Pack16B*>(x + static_cast<size_t>(from) * width + i);
        *reinterpret_cast<Pack16B*>(y + static_cast<size_t>(r) * width + i) = v;
    }
}
EXPORT(select_rows_bf16)

// y [tokens, width] = the rows of `table` for `ids`. A warp takes a token.
KERNEL(embedding_bf16, TRAIN_THREADS)
(float* y, const uint32_t* ids, const bf16* table, uint32_t tokens, uint32_t width) {
    griddep_launch_dependents();
    griddep_wait();
    uint32_t token = blockIdx.x * (TRAIN_THREADS / WARP) + warp_index();
    if (token >= tokens) return;
    const bf16* row = table + static_cast<size_t>(ids[token]) * width;
    for (uint32_t i = lane_index() * 4; i < width; i += WARP * 4)
        put_four(y + static_cast<size_t>(token) * width + i, take_four(row + i));
}
EXPORT(embedding_bf16)

// Adds the rows of dx that belong to an id to its row of the table's gradient, in the order of the
// tokens. A block takes one of the different ids: those of group g are tokens[starts[g]] and so on,
// up to starts[g + 1].
KERNEL(embedding_backward, TRAIN_THREADS)
(float* table, const float* dx, const uint32_t* ids, const uint32_t* starts, const uint32_t* tokens,
 uint32_t width) {
    griddep_launch_dependents();
    griddep_wait();
    float* row = table + static_cast<size_t>(ids[blockIdx.x]) * width;
    uint32_t first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    for (uint32_t i = threadIdx.x * 4; i < width; i += TRAIN_THREADS * 4) {
        Float4 sum = take_four(row + i);
        for (uint32_t t = first; t < end; t++) {
            Float4 v = take_four(dx + static_cast<size_t>(tokens[t]) * width + i);
            UNROLL
            for (int j = 0; j < 4; j++) sum.v[j] += v.v[j];
        }
        put_four(row + i, sum);
    }
}
EXPORT(embedding_backward)
