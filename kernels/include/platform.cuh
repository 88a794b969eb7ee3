// How kernels and functions are declared. nvcc compiles them for GPUs; the emulator compiles the
// same files as C++ with the declarations in emulator/include/emulated.h.
#pragma once
#include "abi.h"
#ifdef KERNEL_EMULATOR
#include "emulated.h"
#else
#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

// A kernel for blocks of at most `threads` threads.
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
// A kernel that gets as many registers as allow `blocks` of its blocks on a multiprocessor at a
// time; 0 leaves the choice to the compiler.
#define KERNEL_SHARED(name, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name
// A kernel one block of which fills a multiprocessor.
#define KERNEL_ALONE(name, threads) KERNEL_SHARED(name, threads, 1)
// Stands behind every kernel: it makes the kernel known to the emulator, nvcc needs nothing.
#define EXPORT(name)
#define DEVICE __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define GRID_CONSTANT __grid_constant__
#define UNROLL _Pragma("unroll")

// Whether TMA, wgmma and clusters are there: when compiling for sm_90a, and in the emulator.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER 1
#else
#define HOPPER 0
#endif
#endif
