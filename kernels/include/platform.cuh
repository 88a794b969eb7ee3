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
// A kernel of which one block fills a multiprocessor.
#define KERNEL_ALONE(name, threads) extern "C" __global__ void __launch_bounds__(threads, 1) name
#define EXPORT(name)
#define DEVICE __device__ __forceinline__
#define GRID_CONSTANT __grid_constant__
#define DEVICE_MEMBER __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#endif
