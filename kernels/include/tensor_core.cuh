// Matrix products of a warp.
#pragma once
#include "threads.cuh"

// The instruction of `multiply`.
#define PRODUCT_OF(type)                                                \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "         \
                 "{%0,%1,%2,%3};"                                       \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// c += a b^T for a = [16, 16], b = [8, 16] (both with the inner dimension last) and c = [16, 8] in
// f32. With g = lane / 4 and t = lane % 4, a lane holds
//   a: pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   b: pairs (g, 2t), (g, 2t + 8)
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// Any permutation of the inner dimension will do if it is the same for a and b.
template <class T>
DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef KERNEL_EMULATOR
    struct Lane {
        float* c;
        const uint32_t *a, *b;
    } mine = {c, a, b};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            float a[16][16], b[8][16];
            for (int lane = 0; lane < 32; lane++) {
                const Lane* l = static_cast<const Lane*>(data[lane]);
                int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++) {
                    a[g + i % 2 * 8][2 * t + i / 2 * 8] = low<T>(l->a[i]);
                    a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high<T>(l->a[i]);
                }
                for (int i = 0; i < 2; i++) {
                    b[g][2 * t + i * 8] = low<T>(l->b[i]);
                    b[g][2 * t + i * 8 + 1] = high<T>(l->b[i]);
                }
            }
            for (int lane = 0; lane < 32; lane++) {
                const Lane* l = static_cast<const Lane*>(data[lane]);
                int g = lane / 4, t = lane % 4;
                for (int i = 0; i < 4; i++) {
                    float sum = 0;
                    for (int k = 0; k < 16; k++) sum += a[g + i / 2 * 8][k] * b[2 * t + i % 2][k];
                    l->c[i] += sum;
                }
            }
        },
        &mine, "multiply");
#else
    if constexpr (std::is_same<T, bf16>::value) {
        PRODUCT_OF("bf16");
    } else {
        PRODUCT_OF("f16");
    }
#endif
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane i gives the address of row i % 8
// of matrix i / 8, and gets of each matrix the pair (lane / 4, 2 (lane % 4)).
DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef KERNEL_EMULATOR
    struct Lane {
        Eight row;
        uint32_t* out;
    } mine = {*static_cast<const Eight*>(row), out};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            for (int lane = 0; lane < 32; lane++)
                for (int m = 0; m < 4; m++)
                    static_cast<Lane*>(data[lane])->out[m] =
                        static_cast<Lane*>(data[m * 8 + lane / 4])->row.pairs[lane % 4];
        },
        &mine, "load_matrices");
#else
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
#endif
}

// `load_matrices` with each matrix transposed: a lane gets (2 (lane % 4), lane / 4) and (2 (lane %
// 4) + 1, lane / 4).
DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
#ifdef KERNEL_EMULATOR
    struct Lane {
        Eight row;
        uint32_t* out;
    } mine = {*static_cast<const Eight*>(row), out};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            for (int lane = 0; lane < 32; lane++)
                for (int m = 0; m < 4; m++) {
                    uint32_t pair = 0;
                    for (int i = 0; i < 2; i++) {
                        uint32_t word = static_cast<Lane*>(data[m * 8 + 2 * (lane % 4) + i])
                                            ->row.pairs[lane / 8];
                        pair |= (word >> (lane / 4 % 2 * 16) & 0xffff) << (16 * i);
                    }
                    static_cast<Lane*>(data[lane])->out[m] = pair;
                }
        },
        &mine, "load_matrices_transposed");
#else
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
#endif
}

// The way back of `load_matrices`: four 8 x 8 matrices to shared memory, lane i giving the address
// of row i % 8 of matrix i / 8. Hopper alone has an instruction for it.
DEVICE void store_matrices(void* row, const uint32_t (&in)[4]) {
#ifdef KERNEL_EMULATOR
    struct Lane {
        const uint32_t* in;
        Eight row;
    } mine = {in, Eight{}};
    emulator_collective(
        32, 0xffffffff,
        [](void** data, uint32_t) {
            for (int lane = 0; lane < 32; lane++)
                for (int m = 0; m < 4; m++)
                    static_cast<Lane*>(data[m * 8 + lane / 4])->row.pairs[lane % 4] =
                        static_cast<Lane*>(data[lane])->in[m];
        },
        &mine, "store_matrices");
    *static_cast<Eight*>(row) = mine.row;
#elif __CUDA_ARCH__ >= 900
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at),
                 "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
                 : "memory");
#endif
}
