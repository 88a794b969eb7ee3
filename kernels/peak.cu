// The highest rates that a GPU reaches: reading memory, and mma with operands in registers.
// `bprompt bench` measures its floors with these kernels.
#include "memory.cuh"
#include "mma.cuh"

constexpr int THREADS = PEAK_THREADS;

// Reads `count` chunks of 16 bytes once, eight at a time in each thread. `out` keeps the compiler
// from removing the loads.
KERNEL(peak_read, THREADS)(uint32_t* out, const Pack16B* data, uint32_t count) {
    constexpr uint32_t EACH = 8;
    griddep_wait();
    uint32_t sum = 0;
    for (uint32_t i = blockIdx.x * THREADS * EACH + threadIdx.x; i < count;
         i += gridDim.x * THREADS * EACH) {
        Pack16B v[EACH];
        UNROLL
        for (uint32_t j = 0; j < EACH; j++) {
            v[j] = Pack16B{};
            if (i + j * THREADS < count) v[j] = load_streaming(data + i + j * THREADS);
        }
        UNROLL
        for (uint32_t j = 0; j < EACH; j++)
            sum ^= v[j].pairs[0] ^ v[j].pairs[1] ^ v[j].pairs[2] ^ v[j].pairs[3];
    }
    if (sum == 0x9e3779b9) *out = sum;
}
EXPORT(peak_read)

// Each warp runs 8 * `steps` mma_m16n8k16, of 4096 FLOPs each.
template <class T>
DEVICE void peak_mma(float* out, uint32_t steps) {
    griddep_wait();
    uint32_t a[4], b[2];
    UNROLL
    for (int i = 0; i < 4; i++) a[i] = pack<T>(0.5f, -0.25f);
    UNROLL
    for (int i = 0; i < 2; i++) b[i] = pack<T>(0.125f, 0.25f);
    float c[8][4] = {};
    for (uint32_t s = 0; s < steps; s++) {
        UNROLL
        for (int i = 0; i < 8; i++) mma_m16n8k16<T>(c[i], a, b);
    }
    float sum = 0;
    UNROLL
    for (int i = 0; i < 8; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    out[blockIdx.x * THREADS + threadIdx.x] = sum;
}

KERNEL(peak_mma_bf16, THREADS)(float* out, uint32_t steps) { peak_mma<bf16>(out, steps); }
EXPORT(peak_mma_bf16)
KERNEL(peak_mma_f16, THREADS)(float* out, uint32_t steps) { peak_mma<f16>(out, steps); }
EXPORT(peak_mma_f16)
