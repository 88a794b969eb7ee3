// The tensor core instructions of a warp.
#pragma once
#include "threads.cuh"

#ifdef KERNEL_EMULATOR
#include "emulated/mma.h"
#else
// c += a b^T for a = [16, 16] and b = [8, 16], both with the inner dimension last, and c = [16, 8]
// in f32. With g = lane / 4 and t = lane % 4, a lane holds
//   a: pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   b: pairs (g, 2t), (g, 2t + 8)
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// The inner dimension may be permuted in any way that is the same for a and b.
#define MMA_M16N8K16(type)                                              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "         \
                 "{%0,%1,%2,%3};"                                       \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same<T, bf16>::value) {
        MMA_M16N8K16("bf16");
    } else {
        MMA_M16N8K16("f16");
    }
}

// Loads four 8 x 8 matrices of 16-bit numbers from shared memory: lane i gives the address of row
// i % 8 of matrix i / 8, and gets the pair (lane / 4, 2 (lane % 4)) of each matrix.
DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}

// Transposes each of the matrices: a lane gets (2 (lane % 4), lane / 4) and
// (2 (lane % 4) + 1, lane / 4).
DEVICE void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}
#endif
