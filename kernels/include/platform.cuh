// Where a kernel is compiled: by nvcc for GPUs, or as C++ for the emulator.
#pragma once
#ifdef KERNEL_EMULATOR
#include "emulated.h"
#else
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
#define EXPORT(name)
#define DEVICE __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#endif
