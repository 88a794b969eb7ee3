// What stands in for CUDA when kernels are compiled as C++: where the thread is, how kernels and
// functions are declared, and calls into the emulator. What the wrapped instructions mean is in
// emulated/, one header for each of kernels/include.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

struct dim3_t {
    uint32_t x, y, z;
};

// Laid out as `ThreadCoords` in emulator/src/block.rs.
struct EmulatedThread {
    dim3_t thread, block, block_size, grid_size;
    char* shared;
    uint32_t shared_bytes;
};

extern "C" {
const EmulatedThread* emulator_thread();
// Waits until `count` threads of the block have called it with the same `id`. The lanes of a warp
// must come from the same `line` of the source.
void emulator_barrier(uint32_t id, uint32_t count, uint32_t line);
// Waits until all threads of `mask` in the group of `size` (32 for a warp, 128 for a warpgroup)
// have called it with the same `op`, then runs `op` once with the `data` of all of them. `name` is
// for reports.
void emulator_collective(uint32_t size, uint32_t mask, void (*op)(void** data, uint32_t mask),
                         void* data, const char* name);
// cp.async: a copy happens no earlier than the wait for its group.
void emulator_cp_async(void* shared, const void* global, uint32_t bytes, uint32_t zeros);
void emulator_cp_async_commit_group();
void emulator_cp_async_wait_group(uint32_t groups_left);
// mbarriers and TMA.
void emulator_mbarrier_init(uint64_t* barrier, uint32_t count);
void emulator_fence_mbarrier_init();
void emulator_fence_proxy_async();
void emulator_mbarrier_arrive(uint64_t* barrier, uint32_t bytes);
// Arrives at the mbarrier at the same offset in block `rank` of the cluster.
void emulator_mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank);
void emulator_mbarrier_wait(uint64_t* barrier, uint32_t parity);
// Copies the tile to the same offset in each block of the cluster whose bit is set, or to this
// block alone if none is.
void emulator_tma_load(void* shared, const void* map, uint32_t row, uint32_t column,
                       uint64_t* barrier, uint32_t blocks);
// An array of registers: its address and bytes.
struct EmulatedRegisters {
    const void* at;
    size_t bytes;
};
// wgmma: it happens no earlier than the wait for its group, with the data of all 128 threads and no
// mask, or at once, with those of a warp and a mask. `data` is copied.
// `registers` are the accumulators and the operand in registers, if there is one.
void emulator_wgmma_fence();
void emulator_wgmma(void (*op)(void** data, uint32_t mask), const void* data, size_t size,
                    const EmulatedRegisters (*registers)[2], const char* name);
void emulator_wgmma_commit_group();
void emulator_wgmma_wait_group(uint32_t groups_left);
// Checks, on behalf of a wgmma, bytes of shared memory that it reads: that they were written, are
// visible to it, and have this swizzle if TMA wrote them.
void emulator_check_operand(const void* shared, uint32_t bytes, uint32_t swizzle);
// Reports what is wrong with an operand of the operation that runs.
void emulator_operand_is_wrong(const char* what);
void emulator_setmaxnreg(uint32_t count, bool increase);
// Dependent launches.
void emulator_griddep_wait();
// Fences and atomics of device memory.
void emulator_device_fence();
uint32_t emulator_atomic_add(uint32_t* word, uint32_t n, bool release);
uint32_t emulator_atomic_load_acquire(const uint32_t* word);
// Checks a load through the read-only cache.
void emulator_check_read_only(const void* p, uint32_t bytes);
// Clusters: how many blocks, a barrier of all their threads, and the address of the same offset in
// the shared memory of block `rank`.
uint32_t emulator_cluster_size();
void emulator_cluster_barrier();
void* emulator_cluster_shared(const void* shared, uint32_t rank);
// Lets other threads run; for loops that wait for memory.
void emulator_yield();
// `image` is where the program or library lies that the kernel is a part of.
void emulator_register(const char* name, void (*call)(void** args), uint32_t threads,
                       uint32_t blocks, const uint32_t* sizes, uint32_t count,
                       const char* const (*image)[2]);
// Set by the linker.
extern __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];
}

// Stands before the names of kernels.
#ifndef KERNEL_PREFIX
#define KERNEL_PREFIX ""
#endif

#define threadIdx (emulator_thread()->thread)
#define blockIdx (emulator_thread()->block)
#define blockDim (emulator_thread()->block_size)
#define gridDim (emulator_thread()->grid_size)

namespace emulated {
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(args[I])...);
}
template <auto kernel>
struct Kernel;
template <class... A, void (*kernel)(A...)>
struct Kernel<kernel> {
    Kernel(const char* name, uint32_t threads, uint32_t blocks) {
        const char* const image[2] = {__ehdr_start, _end};
        static const uint32_t sizes[] = {static_cast<uint32_t>(sizeof(A))..., 0};
        emulator_register(
            name,
            [](void** args) { emulated::call(kernel, args, std::index_sequence_for<A...>{}); },
            threads, blocks, sizes, sizeof...(A), &image);
    }
};
} // namespace emulated

#define KERNEL(name, threads) KERNEL_SHARED(name, threads, 0)
#define KERNEL_SHARED(name, threads, blocks)        \
    constexpr uint32_t threads_of_##name = threads; \
    constexpr uint32_t blocks_of_##name = blocks;   \
    extern "C" void name
#define KERNEL_ALONE(name, threads) KERNEL_SHARED(name, threads, 1)
#define EXPORT(name)                                                                              \
    static emulated::Kernel<&name> registration_of_##name(KERNEL_PREFIX #name, threads_of_##name, \
                                                          blocks_of_##name);
#define DEVICE static inline __attribute__((always_inline))
#define UNROLL
#define GRID_CONSTANT
#define DEVICE_MEMBER
#define HOPPER 1
