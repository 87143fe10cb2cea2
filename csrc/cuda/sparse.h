// Products of a sparse matrix with images on a GPU: the twin of cpu/sparse.h, whose conventions are those here.
//
// Images are stored (C, H, W, N), the batch innermost. A block takes a tile of outputs (up to 2048 bytes of each row:
// pixels and images) and 8, 16 or 32 rows. Chunk by chunk of channels it copies to shared memory what the tile reads,
// padded and with stride and dilation resolved; while the next chunk is on its way, each warp adds this one's part of
// its rows' sums, which stay in registers. So a kept weight costs a broadcast of it and one read of the tile from shared
// memory, whose bandwidth is the bound. Rows of a block are dealt to its warps by length. Layers of one pixel with small
// batches are read from the caches instead.
//
// Sums of float16 and bfloat16 are made in float32, those of float64 in float64. Their order depends on shapes, dtype
// and alignment alone: results repeat bit for bit, on any chip. Entries of a pattern that may not be followed are left out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/floats.h"
#include "core/pattern.h"
#include "cuda/portable.h"

namespace exssnet::cuda {


// All pointers are to memory of the device; values, images and results are of one dtype. Images aligned to 16 bytes,
// with batches that fill vectors of 16 bytes, are faster.
struct SparseValues {
  const void *free, *frozen;
  int64_t free_count, count;  // count: free and frozen
};

// What becomes of a finished sum: see cpu::Epilogue.
struct SparseEpilogue {
  const void *scale = nullptr, *bias = nullptr, *residual = nullptr;
  bool relu = false;
};

// y (O, H', W', N) from x (C, H, W, N). `processors`: of the device, sizes the blocks. One launch.
cudaError_t sparse_forward(const Convolution& c, const Pattern& pattern, const SparseValues& values,
                           const SparseEpilogue& epilogue, Float dtype, const void* x, void* y, int processors,
                           cudaStream_t stream);

// grad_x (C, H, W, N) from grad (O, H', W', N). One launch.
cudaError_t sparse_input_gradient(const Convolution& c, const Pattern& transposed, const SparseValues& values,
                                  Float dtype, const void* grad, void* grad_x, int processors, cudaStream_t stream);

// Of scratch memory, aligned to 16 bytes, for the gradient of the values: the parts of sums that are split.
size_t sparse_workspace_bytes(const Convolution& c, const Pattern& pattern, int64_t free_count, Float dtype);

// grad_values (free_count,) from x (C, H, W, N) and grad (O, H', W', N), of those in the pattern. Sums over many
// pixels are split; then a second launch adds the parts.
cudaError_t sparse_value_gradient(const Convolution& c, const Pattern& pattern, int64_t free_count, Float dtype,
                                  const void* x, const void* grad, void* grad_values, void* workspace,
                                  cudaStream_t stream);

}  // namespace exssnet::cuda
