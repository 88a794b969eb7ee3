// Where a kernel is compiled: by nvcc for GPUs, or as C++ for the emulator.
#pragma once
#ifdef KERNEL_EMULATOR
#include "emulated.h"
#else
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
// A kernel that gets as many registers as let so many of its blocks share a multiprocessor; 0
// leaves it to the compiler.
#define KERNEL_SHARED(name, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name
// A kernel of which one block fills a multiprocessor.
#define KERNEL_ALONE(name, threads) KERNEL_SHARED(name, threads, 1)
#define EXPORT(name)
#define DEVICE __device__ __forceinline__
#define GRID_CONSTANT __grid_constant__
#define DEVICE_MEMBER __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#endif
