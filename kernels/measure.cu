// What a GPU can do at best: reading memory, and products in registers. `bprompt bench` measures
// floors with these.
#include "memory.cuh"
#include "tensor_core.cuh"

constexpr int THREADS = 256;

// Reads `count` pieces of 16 bytes once, eight at a time a thread; `out` keeps the compiler from
// leaving them out.
KERNEL(measure_read, THREADS)(uint32_t* out, const Eight* data, uint32_t count) {
    constexpr uint32_t EACH = 8;
    uint32_t sum = 0;
    for (uint32_t i = blockIdx.x * THREADS * EACH + threadIdx.x; i < count;
         i += gridDim.x * THREADS * EACH) {
        Eight v[EACH];
        UNROLL
        for (uint32_t j = 0; j < EACH; j++) {
            v[j] = Eight{};
            if (i + j * THREADS < count) v[j] = load_once(data + i + j * THREADS);
        }
        UNROLL
        for (uint32_t j = 0; j < EACH; j++)
            sum ^= v[j].pairs[0] ^ v[j].pairs[1] ^ v[j].pairs[2] ^ v[j].pairs[3];
    }
    if (sum == 0x9e3779b9) *out = sum;
}
EXPORT(measure_read)

// 8 * `steps` products of 16 x 8 x 16 a warp: 4096 FLOPs each.
template <class T>
DEVICE void measure_multiply(float* out, uint32_t steps) {
    uint32_t a[4], b[2];
    UNROLL
    for (int i = 0; i < 4; i++) a[i] = pack<T>(0.5f, -0.25f);
    UNROLL
    for (int i = 0; i < 2; i++) b[i] = pack<T>(0.125f, 0.25f);
    float c[8][4] = {};
    for (uint32_t s = 0; s < steps; s++) {
        UNROLL
        for (int i = 0; i < 8; i++) multiply<T>(c[i], a, b);
    }
    float sum = 0;
    UNROLL
    for (int i = 0; i < 8; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    out[blockIdx.x * THREADS + threadIdx.x] = sum;
}

KERNEL(measure_multiply_bf16, THREADS)(float* out, uint32_t steps) {
    measure_multiply<bf16>(out, steps);
}
EXPORT(measure_multiply_bf16)
KERNEL(measure_multiply_f16, THREADS)(float* out, uint32_t steps) {
    measure_multiply<f16>(out, steps);
}
EXPORT(measure_multiply_f16)
