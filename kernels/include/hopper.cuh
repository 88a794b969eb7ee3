// What only Hopper has: barrier objects in shared memory, the copy engine for tiles (TMA), and products of a warpgroup of 128
// threads that read both operands from shared memory (wgmma). Compiled for sm_90a; in the emulator always.
#pragma once
#include "threads.cuh"

constexpr int WARPGROUP = 128;

// A matrix that the copy engine reads tiles of; made by the host (src/device). Passed by value.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

#if defined(KERNEL_EMULATOR) || (defined(__CUDA_ARCH_FEAT_SM90_ALL))
#define HOPPER 1
#else
#define HOPPER 0
#endif

#if HOPPER

#ifndef KERNEL_EMULATOR
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// A barrier object is 8 bytes of shared memory. Its phases begin with 0; a phase ends when `count` arrivals and all expected
// bytes have come.
DEVICE void barrier_init(uint64_t* barrier, uint32_t count) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_init(barrier, count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}
// Makes initialized barriers seen by the copy engine.
DEVICE void barrier_init_done() {
#ifndef KERNEL_EMULATOR
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEVICE void barrier_arrive(uint64_t* barrier) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_arrive(barrier, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// Arrives, and lets the phase wait for so many bytes more.
DEVICE void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_arrive(barrier, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
// Waits until the phase of this parity has ended.
DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef KERNEL_EMULATOR
    emulator_barrier_wait(barrier, parity);
#else
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end;\nbra again;\nend:\n}"
        ::"r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
}

// Copies the map's tile whose first element is (row, column) to `shared` (aligned to 1024 bytes; rows of 128 bytes whose 16-byte
// pieces are swizzled by the row's number), zeros beyond the matrix; its bytes arrive at `barrier`.
DEVICE void copy_tile(void* shared, const TensorMap* map, uint32_t row, uint32_t column, uint64_t* barrier) {
#ifdef KERNEL_EMULATOR
    emulator_copy_tile(shared, map, row, column, barrier);
#else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                     shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
#endif
}

// How the tensor cores find an operand [rows, 64] in shared memory as `copy_tile` leaves it, from inner element `k` on.
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

DEVICE void products_begin() {
#ifndef KERNEL_EMULATOR
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
DEVICE void products_commit() {
#ifndef KERNEL_EMULATOR
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until all but the `left` youngest groups of products are done.
template <int left>
DEVICE void products_wait() {
#ifndef KERNEL_EMULATOR
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#endif
}

// Registers of each thread of this warpgroup from here on.
template <int count>
DEVICE void give_registers() {
#ifndef KERNEL_EMULATOR
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
template <int count>
DEVICE void take_registers() {
#ifndef KERNEL_EMULATOR
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// The instruction, with its 128 sums.
#define PRODUCTS_OF(type)   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                                    \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                   \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                   \
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                   \
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                   \
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "       \
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"     \
                 "}, %128, %129, p, 1, 1, 0, 0;\n}"                                                                   \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),    \
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),\
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),\
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),\
                   "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),\
                   "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),\
                   "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),\
                   "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),\
                   "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),\
                   "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),\
                   "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),\
                   "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),\
                   "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),\
                   "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),\
                   "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),\
                   "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])\
                 : "l"(a), "l"(b), "r"(1))

// d += a b^T for a = [64, 16] and b = [256, 16], both operands in shared memory, by a warpgroup. With w = warp in the group, g =
// lane / 4 and t = lane % 4, a thread holds of rows 16 w + g (and + 8) the columns 8 j + 2 t and + 1, in d[4 j] and d[4 j + 1] (d[4 j
// + 2] and d[4 j + 3]).
template <class T>
DEVICE void multiply_group(float (&d)[128], uint64_t a, uint64_t b) {
#ifdef KERNEL_EMULATOR
    struct Thread {
        float* d;
        uint64_t a, b;
        const char* shared;
    } mine = {d, a, b, emulator_thread()->shared};
    emulator_collective(
        WARPGROUP, 0xffffffff,
        [](void** data, uint32_t) {
            const Thread* first = static_cast<const Thread*>(data[0]);
            static thread_local float a[64][16], b[256][16];
            auto read = [&](uint64_t operand, int rows, float(*to)[16]) {
                uint64_t start = (operand & 0x3fff) << 4, group = (operand >> 32 & 0x3fff) << 4;
                for (int r = 0; r < rows; r++)
                    for (int k = 0; k < 16; k++) {
                        uint64_t at = start + r / 8 * group + r % 8 * 128 + k * 2;
                        at ^= (at >> 7 & 7) << 4;
                        T x;
                        memcpy(&x, first->shared + at, 2);
                        to[r][k] = to_float(x);
                    }
            };
            read(first->a, 64, a);
            read(first->b, 256, b);
            for (int thread = 0; thread < WARPGROUP; thread++) {
                float* d = static_cast<const Thread*>(data[thread])->d;
                int g = thread % 32 / 4, t = thread % 4, row = thread / 32 * 16 + g;
                for (int i = 0; i < 128; i++) {
                    const float *x = a[row + i / 2 % 2 * 8], *y = b[i / 4 * 8 + 2 * t + i % 2];
                    float sum = 0;
                    for (int k = 0; k < 16; k++) sum += x[k] * y[k];
                    d[i] += sum;
                }
            }
        },
        &mine, "multiply_group");
#else
    if constexpr (std::is_same<T, bf16>::value) {
        PRODUCTS_OF("bf16");
    } else {
        PRODUCTS_OF("f16");
    }
#endif
}

#endif // HOPPER
