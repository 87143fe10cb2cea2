// The features of CUDA that the kernels use. nvcc compiles the kernels for GPUs. The tests compile them as plain C++
// with tests/helpers/cuda/emulator.h, which runs them on a CPU. Launches, dynamic shared memory and asynchronous copies
// therefore use the macros and functions of this file.
#pragma once

#ifdef EXSSNET_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Launches a kernel and returns the cudaError_t of the launch.
#define EXSSNET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__), cudaGetLastError())

// Declares `T* name`: the dynamic shared memory of the block.
#define EXSSNET_DYNAMIC_SHARED(T, name)                  \
  extern __shared__ __align__(16) unsigned char name##_[]; \
  T* const name = reinterpret_cast<T*>(name##_)

#ifdef __CUDACC__
namespace exssnet::cuda {

// Copies a vector, or zeros, to shared memory. This thread can read it after await_copies(). Other threads need a
// barrier after that.
__device__ inline void copy_async(uint4* to, const uint4* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(__cvta_generic_to_global(from)),
                 "r"(wanted ? 16 : 0)
               : "memory");
}
__device__ inline void await_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

}  // namespace exssnet::cuda
#endif
#endif
