// What stands in for CUDA when kernels are compiled as C++: the thread's place, and calls into the
// emulator.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

struct dim3_t {
    uint32_t x, y, z;
};

// Laid out as in emulator/src/block.rs.
struct EmulatedThread {
    dim3_t thread, block, block_size, grid_size;
    char* shared;
    uint32_t shared_bytes;
};

extern "C" {
const EmulatedThread* emulator_thread();
// Waits until `count` threads of the block have called it with the same `id`.
void emulator_barrier(uint32_t id, uint32_t count);
// Waits until all threads of `mask` in the group of `size` (32: a warp; 128: a warpgroup) have
// called it with the same `op`, runs `op` once with everybody's `data`, and goes on. `name` is for
// reports.
void emulator_collective(uint32_t size, uint32_t mask, void (*op)(void** data, uint32_t mask),
                         void* data, const char* name);
// Copies that happen no earlier than the wait for their group.
void emulator_copy_async(void* shared, const void* global, uint32_t bytes, uint32_t zeros);
void emulator_copy_commit();
void emulator_copy_wait(uint32_t groups_left);
// Barrier objects, and the copy engine.
void emulator_barrier_init(uint64_t* barrier, uint32_t count);
void emulator_barrier_arrive(uint64_t* barrier, uint32_t bytes);
// At the barrier object in the same place of a block of the cluster.
void emulator_barrier_arrive_in(uint64_t* barrier, uint32_t rank);
void emulator_barrier_wait(uint64_t* barrier, uint32_t parity);
// The tile goes to the same place in each block of the cluster whose bit is set; 0: to this block
// alone.
void emulator_copy_tile(void* shared, const void* map, uint32_t row, uint32_t column,
                        uint64_t* barrier, uint32_t blocks);
// Products of a warpgroup that happen no earlier than the wait for their group; `data` is kept.
void emulator_product(void (*op)(void** data, uint32_t mask), const void* data, size_t size,
                      const char* name);
void emulator_products_commit();
void emulator_products_wait(uint32_t groups_left);
// For operations of several threads: whether bytes of shared memory that they read were written.
void emulator_check(const void* shared, uint32_t bytes);
// Blocks of a cluster: how many, a barrier of all their threads, and where a place in shared memory
// is in another of them.
uint32_t emulator_cluster_size();
void emulator_cluster_barrier();
void* emulator_cluster_shared(const void* shared, uint32_t rank);
// Lets the other threads run: for loops that wait for memory.
void emulator_yield();
void emulator_register(const char* name, void (*call)(void** args), uint32_t threads,
                       const uint32_t* sizes, uint32_t count);
}

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
    Kernel(const char* name, uint32_t threads) {
        static const uint32_t sizes[] = {static_cast<uint32_t>(sizeof(A))..., 0};
        emulator_register(
            name,
            [](void** args) { emulated::call(kernel, args, std::index_sequence_for<A...>{}); },
            threads, sizes, sizeof...(A));
    }
};
} // namespace emulated

#define KERNEL(name, threads)                       \
    constexpr uint32_t threads_of_##name = threads; \
    extern "C" void name
#define KERNEL_SHARED(name, threads, blocks) KERNEL(name, threads)
#define KERNEL_ALONE(name, threads) KERNEL(name, threads)
#define EXPORT(name) \
    static emulated::Kernel<&name> registration_of_##name(#name, threads_of_##name);
#define DEVICE static inline __attribute__((always_inline))
#define UNROLL
#define GRID_CONSTANT
#define DEVICE_MEMBER
