// What the wgmma of include/wgmma.cuh mean on the CPU. They run at the wait for their group and no
// earlier, on what registers and shared memory hold then.
#pragma once

DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit_group() { emulator_wgmma_commit_group(); }
template <int left>
DEVICE void wgmma_wait_group() {
    emulator_wgmma_wait_group(left);
}
template <int n>
DEVICE void wgmma_fence_operand(float (&)[n]) {}

// What a thread gives to one wgmma.
struct WgmmaOperands {
    float* d;
    const uint32_t* rows; // `a` in registers, or null
    uint64_t a, b;
    const EmulatedThread* thread;
    bool zero;
};

// d (+)= a b^T for a = [64, 16] and b = [N, 16], once all 128 threads have given their operands.
template <class T, int N, bool TRANS>
void run_wgmma(void** data, uint32_t) {
    const WgmmaOperands* first = static_cast<const WgmmaOperands*>(data[0]);
    static thread_local float a[64][16], b[N][16];
    auto at = [&](uint64_t operand, int row, int column) {
        uint64_t start = (operand & 0x3fff) << 4, group = (operand >> 32 & 0x3fff) << 4;
        uint64_t offset = start + row / 8 * group + row % 8 * 128 + column * 2;
        offset ^= (offset >> 7 & 7) << 4;
        emulator_check(first->thread->shared + offset, 2);
        T x = {0x7fff};
        if (offset + 2 <= first->thread->shared_bytes)
            memcpy(&x, first->thread->shared + offset, 2);
        return to_float(x);
    };
    for (int n = 0; n < N; n++)
        for (int k = 0; k < 16; k++) b[n][k] = TRANS ? at(first->b, k, n) : at(first->b, n, k);
    for (int row = 0; row < 64; row++)
        for (int k = 0; k < 16; k++) {
            if (first->rows) {
                const uint32_t* r =
                    static_cast<const WgmmaOperands*>(data[row / 16 * 32 + row % 8 * 4 + k % 8 / 2])
                        ->rows;
                uint32_t pair = r[row % 16 / 8 + k / 8 * 2];
                a[row][k] = k % 2 ? high<T>(pair) : low<T>(pair);
            } else {
                a[row][k] = at(first->a, row, k);
            }
        }
    for (int thread = 0; thread < WARPGROUP; thread++) {
        const WgmmaOperands* mine = static_cast<const WgmmaOperands*>(data[thread]);
        int g = thread % 32 / 4, t = thread % 4, row = thread / 32 * 16 + g;
        for (int i = 0; i < N / 2; i++) {
            const float *x = a[row + i / 2 % 2 * 8], *y = b[i / 4 * 8 + 2 * t + i % 2];
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += x[k] * y[k];
            mine->d[i] = sum + (mine->zero ? 0 : mine->d[i]);
        }
    }
}

template <class T, int N, bool TRANS>
DEVICE void emulated_wgmma(float* d, const uint32_t* rows, uint64_t a, uint64_t b, bool zero) {
    WgmmaOperands mine = {d, rows, a, b, emulator_thread(), zero};
    emulator_wgmma(run_wgmma<T, N, TRANS>, &mine, sizeof(mine), "wgmma");
}

template <class T, int N>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b) {
    emulated_wgmma<T, N, false>(d, nullptr, a, b, false);
}
template <class T, int N, bool TRANS>
DEVICE void wgmma_rs(float* d, const uint32_t (&a)[4], uint64_t b, bool zero) {
    emulated_wgmma<T, N, TRANS>(d, a, 0, b, zero);
}
