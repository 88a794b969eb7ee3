// Products of a warpgroup of 128 threads (wgmma). They run while the threads go on: operands in
// shared memory must stay, and registers be left alone, until the products are waited for. In the
// emulator they happen at that wait and no earlier.
#pragma once
#include "hopper.cuh"

#if HOPPER

// How the tensor cores find an operand [rows, 64] in shared memory as `copy_tile` leaves it, from
// inner element `k` on.
DEVICE uint64_t operand(const void* tile, int k) {
#ifdef KERNEL_EMULATOR
    uint64_t at = static_cast<const char*>(tile) - emulator_thread()->shared;
#else
    uint64_t at = shared_address(tile);
#endif
    at += k * 2;
    // address, distance of groups of 8 rows (1024 bytes), 128-byte swizzle; units of 16 bytes
    return (at >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// The same for a tile [inner elements, up to 64 columns], whose rows are the inner dimension, from
// row `k` on.
DEVICE uint64_t operand_transposed(const void* tile, int k) {
    return operand(static_cast<const char*>(tile) + k * 128, 0);
}

// Orders what these threads did to registers and shared memory before the products that follow.
DEVICE void products_begin() {
#ifndef KERNEL_EMULATOR
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
DEVICE void products_commit() {
#ifdef KERNEL_EMULATOR
    emulator_products_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until all but the `left` youngest groups of products are done.
template <int left>
DEVICE void products_wait() {
#ifdef KERNEL_EMULATOR
    emulator_products_wait(left);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#endif
}
// Keeps the compiler from using sums before the wait that stands in front of this.
template <int n>
DEVICE void products_arrived(float (&d)[n]) {
#ifndef KERNEL_EMULATOR
    UNROLL
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#ifdef KERNEL_EMULATOR
// One product as a thread asks for it.
struct AskedProduct {
    float* d;
    const uint32_t* rows; // `a` in registers, or null
    uint64_t a, b;
    const EmulatedThread* place;
    bool fresh;
};

// d (+)= a b^T for a = [64, 16] and b = [N, 16], by what the 128 threads asked for.
template <class T, int N, bool TRANSPOSED>
void emulated_product(void** data, uint32_t) {
    const AskedProduct* first = static_cast<const AskedProduct*>(data[0]);
    static thread_local float a[64][16], b[N][16];
    auto at = [&](uint64_t operand, int row, int column) {
        uint64_t start = (operand & 0x3fff) << 4, group = (operand >> 32 & 0x3fff) << 4;
        uint64_t place = start + row / 8 * group + row % 8 * 128 + column * 2;
        place ^= (place >> 7 & 7) << 4;
        emulator_check(first->place->shared + place, 2);
        T x = {0x7fff};
        if (place + 2 <= first->place->shared_bytes) memcpy(&x, first->place->shared + place, 2);
        return to_float(x);
    };
    for (int n = 0; n < N; n++)
        for (int k = 0; k < 16; k++) b[n][k] = TRANSPOSED ? at(first->b, k, n) : at(first->b, n, k);
    for (int row = 0; row < 64; row++)
        for (int k = 0; k < 16; k++) {
            if (first->rows) {
                const uint32_t* r =
                    static_cast<const AskedProduct*>(data[row / 16 * 32 + row % 8 * 4 + k % 8 / 2])
                        ->rows;
                uint32_t pair = r[row % 16 / 8 + k / 8 * 2];
                a[row][k] = k % 2 ? high<T>(pair) : low<T>(pair);
            } else {
                a[row][k] = at(first->a, row, k);
            }
        }
    for (int thread = 0; thread < WARPGROUP; thread++) {
        const AskedProduct* asked = static_cast<const AskedProduct*>(data[thread]);
        int g = thread % 32 / 4, t = thread % 4, row = thread / 32 * 16 + g;
        for (int i = 0; i < N / 2; i++) {
            const float *x = a[row + i / 2 % 2 * 8], *y = b[i / 4 * 8 + 2 * t + i % 2];
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += x[k] * y[k];
            asked->d[i] = sum + (asked->fresh ? 0 : asked->d[i]);
        }
    }
}

template <class T, int N, bool TRANSPOSED>
DEVICE void ask_product(float* d, const uint32_t* rows, uint64_t a, uint64_t b, bool fresh) {
    AskedProduct asked = {d, rows, a, b, emulator_thread(), fresh};
    emulator_product(emulated_product<T, N, TRANSPOSED>, &asked, sizeof(asked),
                     "a warpgroup's product");
}
#endif

// Sums of an instruction, eight at a time.
#define SUMS_8(d, i)                                                                            \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)
#define SUMS_64(d) SUMS_32(d, 0), SUMS_32(d, 32)
#define SUMS_128(d) SUMS_64(d), SUMS_32(d, 64), SUMS_32(d, 96)
#define NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NUMBERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_32                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_64                                                                                \
    NUMBERS_32 ", "                                                                               \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_128                                                                               \
    NUMBERS_64 ", "                                                                               \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
               "%110, %111, "                                                                     \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
               "%125, %126, %127"

// d += a b^T for a = [64, 16] and b = [N, 16], both operands in shared memory. With w = warp in the
// group, g = lane / 4 and t = lane % 4, a thread holds of rows 16 w + g (and + 8) the columns 8 j +
// 2 t and + 1, in d[4 j] and d[4 j + 1] (d[4 j + 2] and d[4 j + 3]).
template <class T, int N>
DEVICE void multiply_group(float (&d)[N / 2], uint64_t a, uint64_t b) {
#ifdef KERNEL_EMULATOR
    ask_product<T, N, false>(d, nullptr, a, b, false);
#else
#define PRODUCT_OF_TILES(type, columns, numbers, sums, from, to)                                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" numbers \
                 "}, " from ", " to ", 1, 1, 1, 0, 0;"                                             \
                 : sums                                                                            \
                 : "l"(a), "l"(b))
#define PRODUCT_OF_N(type)                                                       \
    if constexpr (N == 256) {                                                    \
        PRODUCT_OF_TILES(type, "256", NUMBERS_128, SUMS_128(d), "%128", "%129"); \
    } else if constexpr (N == 128) {                                             \
        PRODUCT_OF_TILES(type, "128", NUMBERS_64, SUMS_64(d), "%64", "%65");     \
    } else {                                                                     \
        PRODUCT_OF_TILES(type, "64", NUMBERS_32, SUMS_32(d, 0), "%32", "%33");   \
    }
    static_assert(N == 256 || N == 128 || N == 64, "a shape that is not wrapped");
    if constexpr (std::is_same<T, bf16>::value) {
        PRODUCT_OF_N("bf16");
    } else {
        PRODUCT_OF_N("f16");
    }
#endif
}

// d (+)= a b^T for a = [64, 16] in registers, each warp's 16 rows as for `multiply`, and b = [N,
// 16] in shared memory, or [16, N] if TRANSPOSED. The N / 2 sums of a thread lie as in
// `multiply_group`; `fresh` ones begin at zero.
template <class T, int N, bool TRANSPOSED>
DEVICE void multiply_rows(float* d, const uint32_t (&a)[4], uint64_t b, bool fresh) {
#ifdef KERNEL_EMULATOR
    ask_product<T, N, TRANSPOSED>(d, a, 0, b, fresh);
#else
#define PRODUCT_OF_ROWS(type, columns, numbers, sums, a0, a1, a2, a3, b0, from, transposed)        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " from ", 0;\n"                                 \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" numbers \
                 "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b0 ", p, 1, 1, " transposed ";\n}"        \
                 : sums                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                   "r"(static_cast<int>(!fresh)))
#define PRODUCT_64(type, transposed)                                                          \
    PRODUCT_OF_ROWS(type, "64", NUMBERS_32, SUMS_32(d, 0), "%32", "%33", "%34", "%35", "%36", \
                    "%37", transposed)
#define PRODUCT_32(type, transposed)                                                          \
    PRODUCT_OF_ROWS(type, "32", NUMBERS_16, SUMS_16(d, 0), "%16", "%17", "%18", "%19", "%20", \
                    "%21", transposed)
#define PRODUCT_16(type, transposed)                                                             \
    PRODUCT_OF_ROWS(type, "16", NUMBERS_8, SUMS_8(d, 0), "%8", "%9", "%10", "%11", "%12", "%13", \
                    transposed)
    constexpr bool brain = std::is_same<T, bf16>::value;
    static_assert(N == 64 || (TRANSPOSED && (N == 32 || N == 16)), "a shape that is not wrapped");
    if constexpr (!TRANSPOSED && brain) {
        PRODUCT_64("bf16", "0");
    } else if constexpr (!TRANSPOSED) {
        PRODUCT_64("f16", "0");
    } else if constexpr (N == 64 && brain) {
        PRODUCT_64("bf16", "1");
    } else if constexpr (N == 64) {
        PRODUCT_64("f16", "1");
    } else if constexpr (N == 32 && brain) {
        PRODUCT_32("bf16", "1");
    } else if constexpr (N == 32) {
        PRODUCT_32("f16", "1");
    } else if constexpr (brain) {
        PRODUCT_16("bf16", "1");
    } else {
        PRODUCT_16("f16", "1");
    }
#endif
}

#endif // HOPPER
