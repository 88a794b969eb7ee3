// The tensor core instructions of a warpgroup of 128 threads. wgmma runs asynchronously: until
// wgmma_wait_group has returned, its operands in shared memory and its registers must be left
// alone.
#pragma once
#include "hopper.cuh"

#if HOPPER

// Describes an operand in shared memory that tma_load wrote with 128-byte swizzling: its address,
// `leading` bytes between tiles of 128 bytes side by side, and 1024 bytes between groups of 8 rows.
// Addresses and distances are in units of 16 bytes.
DEVICE uint64_t swizzled_descriptor(uint32_t address, uint32_t leading) {
    constexpr uint64_t SWIZZLE_128 = 1;
    return (address >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(1024 >> 4) << 32 | SWIZZLE_128 << 62;
}
// Describes an operand [rows, 64] from inner element `k` on. An instruction reads 16 inner
// elements, so there is no second tile side by side, and the distance to it is not used.
DEVICE uint64_t wgmma_descriptor(const void* tile, int k) {
    return swizzled_descriptor(shared_address(tile) + k * 2, 16);
}
// Describes tiles [inner elements, 64 columns], whose rows are the inner dimension, from row `k`
// on. The next 64 columns are `tile_bytes` behind the first.
DEVICE uint64_t wgmma_descriptor_transposed(const void* tiles, int k, uint32_t tile_bytes) {
    return swizzled_descriptor(shared_address(tiles) + k * 128, tile_bytes);
}

#ifdef KERNEL_EMULATOR
#include "emulated/wgmma.h"
#else
// Orders this warpgroup's accesses to registers before the wgmma that follow.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the `left` youngest groups are still running.
template <int left>
DEVICE void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// Keeps the compiler from moving uses of the accumulators up across the wait before this.
template <int n>
DEVICE void wgmma_fence_operand(float (&d)[n]) {
    UNROLL
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The accumulators of an instruction as operands, and the numbers of as many operands.
#define ACCUMULATORS_4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define ACCUMULATORS_8(d, i)                                                                    \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define ACCUMULATORS_16(d, i) ACCUMULATORS_8(d, i), ACCUMULATORS_8(d, i + 8)
#define ACCUMULATORS_32(d, i) ACCUMULATORS_16(d, i), ACCUMULATORS_16(d, i + 16)
#define ACCUMULATORS_40(d) ACCUMULATORS_32(d, 0), ACCUMULATORS_8(d, 32)
#define ACCUMULATORS_48(d) ACCUMULATORS_32(d, 0), ACCUMULATORS_16(d, 32)
#define ACCUMULATORS_64(d) ACCUMULATORS_32(d, 0), ACCUMULATORS_32(d, 32)
#define ACCUMULATORS_128(d) ACCUMULATORS_64(d), ACCUMULATORS_32(d, 64), ACCUMULATORS_32(d, 96)
#define OPERANDS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OPERANDS_32                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_40 OPERANDS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define OPERANDS_48 OPERANDS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define OPERANDS_64                                                                                \
    OPERANDS_32 ", "                                                                               \
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPERANDS_128                                                                               \
    OPERANDS_64 ", "                                                                               \
                "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
                "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
                "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
                "%110, %111, "                                                                     \
                "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
                "%125, %126, %127"

// d += a b^T for a = [64, 16] and b = [N, 16], or transposed [16, 64] and [16, N], both in shared
// memory. With w = warp of the group, g = lane / 4 and t = lane % 4, a thread has columns 8 j + 2 t
// and + 1 of row 16 w + g in d[4 j] and d[4 j + 1], and of row 16 w + g + 8 in d[4 j + 2] and
// d[4 j + 3].
template <class T, int N, bool TRANS_A = false, bool TRANS_B = false>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b) {
#define WGMMA_SS(type, n, operands, accumulators, from, to, trans_a, trans_b)                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" operands \
                 "}, " from ", " to ", 1, 1, 1, " trans_a ", " trans_b ";"                    \
                 : accumulators                                                               \
                 : "l"(a), "l"(b), "n"(static_cast<int>(TRANS_A)), "n"(static_cast<int>(TRANS_B)))
#define WGMMA_SS_N(type)                                                                          \
    if constexpr (N == 256) {                                                                     \
        WGMMA_SS(type, "256", OPERANDS_128, ACCUMULATORS_128(d), "%128", "%129", "%130", "%131"); \
    } else if constexpr (N == 128) {                                                              \
        WGMMA_SS(type, "128", OPERANDS_64, ACCUMULATORS_64(d), "%64", "%65", "%66", "%67");       \
    } else if constexpr (N == 64) {                                                               \
        WGMMA_SS(type, "64", OPERANDS_32, ACCUMULATORS_32(d, 0), "%32", "%33", "%34", "%35");     \
    } else {                                                                                      \
        WGMMA_SS(type, "8", "%0, %1, %2, %3", ACCUMULATORS_4(d), "%4", "%5", "%6", "%7");         \
    }
    static_assert(N == 256 || N == 128 || N == 64 || N == 8, "this shape of wgmma is not wrapped");
    if constexpr (std::is_same<T, bf16>::value) {
        WGMMA_SS_N("bf16");
    } else {
        WGMMA_SS_N("f16");
    }
}

// d += a b^T, or d = a b^T if `zero`, for a = [64, 16] in registers, each warp with 16 rows as for
// mma_m16n8k16, and b = [N, 16] in shared memory, or [16, N] if TRANS. The N / 2 accumulators of a
// thread are ordered as those of wgmma_ss.
template <class T, int N, bool TRANS>
DEVICE void wgmma_rs(float* d, const uint32_t (&a)[4], uint64_t b, bool zero) {
#define WGMMA_RS(type, n, operands, accumulators, a0, a1, a2, a3, b0, from, trans)            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " from ", 0;\n"                            \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" operands \
                 "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b0 ", p, 1, 1, " trans ";\n}"        \
                 : accumulators                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                        \
                   "r"(static_cast<int>(!zero)))
#define WGMMA_RS_N(type, trans)                                                                   \
    if constexpr (N == 128) {                                                                     \
        WGMMA_RS(type, "128", OPERANDS_64, ACCUMULATORS_64(d), "%64", "%65", "%66", "%67", "%68", \
                 "%69", trans);                                                                   \
    } else if constexpr (N == 96) {                                                               \
        WGMMA_RS(type, "96", OPERANDS_48, ACCUMULATORS_48(d), "%48", "%49", "%50", "%51", "%52",  \
                 "%53", trans);                                                                   \
    } else if constexpr (N == 80) {                                                               \
        WGMMA_RS(type, "80", OPERANDS_40, ACCUMULATORS_40(d), "%40", "%41", "%42", "%43", "%44",  \
                 "%45", trans);                                                                   \
    } else if constexpr (N == 64) {                                                               \
        WGMMA_RS(type, "64", OPERANDS_32, ACCUMULATORS_32(d, 0), "%32", "%33", "%34", "%35",      \
                 "%36", "%37", trans);                                                            \
    } else {                                                                                      \
        WGMMA_RS(type, "32", OPERANDS_16, ACCUMULATORS_16(d, 0), "%16", "%17", "%18", "%19",      \
                 "%20", "%21", trans);                                                            \
    }
    static_assert(N == 128 || N == 96 || N == 80 || N == 64 || N == 32,
                  "this shape of wgmma is not wrapped");
    constexpr bool is_bf16 = std::is_same<T, bf16>::value;
    if constexpr (is_bf16 && TRANS) {
        WGMMA_RS_N("bf16", "1");
    } else if constexpr (is_bf16) {
        WGMMA_RS_N("bf16", "0");
    } else if constexpr (TRANS) {
        WGMMA_RS_N("f16", "1");
    } else {
        WGMMA_RS_N("f16", "0");
    }
}
#endif

#endif // HOPPER
