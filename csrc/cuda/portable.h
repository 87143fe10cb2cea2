// What the kernels take from CUDA. They compile with nvcc for GPUs, and as plain C++ over tests/cuda/emulator.h, which
// runs them on a CPU: so launches and dynamic shared memory go through the macros here, and nothing else is special.
#pragma once

#ifdef EXSSNET_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Launches a kernel and gives the cudaError_t of the launch.
#define EXSSNET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__), cudaGetLastError())

// Declares `T* name`, the dynamic shared memory of the block.
#define EXSSNET_DYNAMIC_SHARED(T, name)                  \
  extern __shared__ __align__(16) unsigned char name##_[]; \
  T* const name = reinterpret_cast<T*>(name##_)
#endif
