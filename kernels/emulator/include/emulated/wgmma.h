// What the wgmma of include/wgmma.cuh mean on the CPU. They run as they are issued, or at the wait
// for their group on what registers and shared memory hold then.
#pragma once

// Instruction: wgmma.fence.sync.aligned;
DEVICE void wgmma_fence() { emulator_wgmma_fence(); }
// Instruction: wgmma.commit_group.sync.aligned;
DEVICE void wgmma_commit_group() { emulator_wgmma_commit_group(); }
// Instruction: wgmma.wait_group.sync.aligned %0;
template <int left>
DEVICE void wgmma_wait_group() {
    emulator_wgmma_wait_group(left);
}
// Instruction: UNROLL for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
template <int n>
DEVICE void wgmma_fence_operand(float (&)[n]) {}

// A matrix descriptor, taken apart. Distances are in bytes.
struct OperandDescriptor {
    uint64_t start, leading, stride;
    uint32_t swizzle; // as the driver numbers them: 0, 32, 64 or 128 bytes
};
DEVICE OperandDescriptor operand_descriptor(uint64_t bits) {
    if (bits & 0x3fffc000c000c000) // all that is no field, and the base offset
        emulator_operand_is_wrong("has a descriptor with bits in reserved fields or a base offset");
    uint32_t code = bits >> 62;
    return {(bits & 0x3fff) << 4, (bits >> 16 & 0x3fff) << 4, (bits >> 32 & 0x3fff) << 4,
            code == 0 ? 0 : 4 - code};
}
// The byte of shared memory where an element of an operand [rows, inner elements] lies; TRANS: the
// inner dimension goes through the rows of the tile. Cores of 8 rows are `stride` apart. Along
// them, whole spans of a swizzle are `leading` apart if TRANS; what is not swizzled is divided into
// cores of 16 bytes.
template <bool TRANS>
DEVICE uint64_t operand_byte(const OperandDescriptor& d, int row, int inner) {
    uint64_t span = 16u << d.swizzle;
    int lines = TRANS ? inner : row;
    uint64_t along = (TRANS ? row : inner) * 2;
    uint64_t offset =
        d.start + lines / 8 * d.stride + lines % 8 * span + along / span * d.leading + along % span;
    uint64_t rows = (1u << d.swizzle) - 1;
    return offset ^ (offset >> 7 & rows) << 4;
}

// What a thread gives to one wgmma.
struct WgmmaOperands {
    float* d;
    const uint32_t* rows; // `a` in registers, or null
    uint64_t a, b;
    const EmulatedThread* thread;
    bool zero;
};

// d (+)= a b^T for a = [64, 16] and b = [N, 16], either of which may be transposed: all 64 rows
// once all 128 threads have given their operands, or the 16 rows of a warp by itself.
template <class T, int N, bool TRANS_A, bool TRANS_B>
void run_wgmma(void** data, uint32_t mask) {
    const WgmmaOperands* first = static_cast<const WgmmaOperands*>(data[0]);
    int threads = mask ? 32 : WARPGROUP, top = first->thread->thread.x % WARPGROUP / 32 * 16;
    static thread_local float a[64][16], b[N][16];
    auto read = [&](const OperandDescriptor& d, uint64_t offset) {
        emulator_check_operand(first->thread->shared + offset, 2, d.swizzle);
        T x = {0x7fff};
        if (offset + 2 <= first->thread->shared_bytes)
            memcpy(&x, first->thread->shared + offset, 2);
        return to_float(x);
    };
    OperandDescriptor operand_b = operand_descriptor(first->b);
    if (operand_b.swizzle == 3 && operand_b.start >> 7 & 7)
        emulator_operand_is_wrong("begins within a group of 8 rows, without a base offset");
    for (int n = 0; n < N; n++)
        for (int k = 0; k < 16; k++)
            b[n][k] = read(operand_b, operand_byte<TRANS_B>(operand_b, n, k));
    OperandDescriptor operand_a = operand_descriptor(first->a);
    for (int row = 0; row < threads / 2; row++)
        for (int k = 0; k < 16; k++) {
            if (first->rows) {
                const uint32_t* r =
                    static_cast<const WgmmaOperands*>(data[row / 16 * 32 + row % 8 * 4 + k % 8 / 2])
                        ->rows;
                uint32_t pair = r[row % 16 / 8 + k / 8 * 2];
                a[row][k] = k % 2 ? high<T>(pair) : low<T>(pair);
            } else {
                a[row][k] = read(operand_a, operand_byte<TRANS_A>(operand_a, top + row, k));
            }
        }
    for (int thread = 0; thread < threads; thread++) {
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

template <class T, int N, bool TRANS_A, bool TRANS_B>
DEVICE void emulated_wgmma(float* d, const uint32_t* rows, uint64_t a, uint64_t b, bool zero) {
    WgmmaOperands mine = {d, rows, a, b, emulator_thread(), zero};
    const EmulatedRegisters registers[2] = {{d, N / 2 * sizeof(float)},
                                            {rows, rows ? 4 * sizeof(uint32_t) : 0}};
    emulator_wgmma(run_wgmma<T, N, TRANS_A, TRANS_B>, &mine, sizeof(mine), &registers, "wgmma");
}

// Instruction: wgmma.mma_async.sync.aligned.m64n k16.f32. { }, , , 1, 1, 1, , 256 %128 %129 %130
//   %131 128 %64 %65 %66 %67 64 %32 %33 %34 %35 %0, %1, %2, %3 %4 %5 %6 %7 this shape of wgmma is
//   not wrapped bf16 f16
template <class T, int N, bool TRANS_A = false, bool TRANS_B = false>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b) {
    emulated_wgmma<T, N, TRANS_A, TRANS_B>(d, nullptr, a, b, false);
}
// Instruction: { .reg .pred p; setp.ne.b32 p, , 0; wgmma.mma_async.sync.aligned.m64n k16.f32. { },
//   { , , , }, , p, 1, 1, ; } 128 %64 %65 %66 %67 %68 %69 96 %48 %49 %50 %51 %52 %53 80
//   %40 %41 %42 %43 %44 %45 64 %32 %33 %34 %35 %36 %37 32 %16 %17 %18 %19 %20 %21 this
//   shape of wgmma is not wrapped bf16 bf16 f16 f16
template <class T, int N, bool TRANS>
DEVICE void wgmma_rs(float* d, const uint32_t (&a)[4], uint64_t b, bool zero) {
    emulated_wgmma<T, N, false, TRANS>(d, a, 0, b, zero);
}
