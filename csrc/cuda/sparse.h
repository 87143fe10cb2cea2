// Products of a sparse matrix with images on a GPU. The conventions are those of cpu/sparse.h.
//
// Images are stored (C, H, W, N), the batch innermost. A block processes a tile of outputs (pixels and images, up to
// 2048 bytes of each row) and 8, 16 or 32 rows. The channels are processed in chunks. The patch of a chunk, the pixels
// that the tile reads, is copied to shared memory. The copy adds the padding and resolves stride and dilation. While
// the next chunk is copied, each warp adds the products of the current chunk to the sums of its rows, which stay in
// registers. A kept weight thus costs one broadcast and one read of the tile from shared memory. The bandwidth of
// shared memory limits the speed. The rows of a block are assigned to its warps by length. Layers of one pixel with
// small batches are read from the caches instead.
//
// Sums of float16 and bfloat16 are computed in float32, those of float64 in float64. The order of a sum depends only on
// shapes, dtype and alignment: results are the same on every chip, bit for bit. Entries of a pattern that are out of
// range are left out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/floats.h"
#include "core/pattern.h"
#include "cuda/portable.h"

namespace exssnet::cuda {


// All pointers point to memory of the device. Values, images and results have the same dtype. Images are processed
// faster if they are aligned to 16 bytes and their batch fills vectors of 16 bytes.
struct SparseValues {
  const void *free, *frozen;
  int64_t free_count, count;  // count: free and frozen
};

// Applied to a finished sum (see cpu::Epilogue).
struct SparseEpilogue {
  const void *scale = nullptr, *bias = nullptr, *residual = nullptr;
  bool relu = false;
};

// y (O, H', W', N) from x (C, H, W, N), in one launch. processors: number of multiprocessors, which affects the blocks.
cudaError_t sparse_forward(const Convolution& c, const Pattern& pattern, const SparseValues& values,
                           const SparseEpilogue& epilogue, Float dtype, const void* x, void* y, int processors,
                           cudaStream_t stream);

// grad_x (C, H, W, N) from grad (O, H', W', N), in one launch.
cudaError_t sparse_input_gradient(const Convolution& c, const Pattern& transposed, const SparseValues& values,
                                  Float dtype, const void* grad, void* grad_x, int processors, cudaStream_t stream);

// Size of the scratch memory, aligned to 16 bytes, for the gradient of the values: the partial sums.
size_t sparse_workspace_bytes(const Convolution& c, const Pattern& pattern, int64_t free_count, Float dtype);

// grad_values (free_count,) from x (C, H, W, N) and grad (O, H', W', N), for the free values in the pattern. Sums over
// many pixels are split, and a second launch adds the partial sums.
cudaError_t sparse_value_gradient(const Convolution& c, const Pattern& pattern, int64_t free_count, Float dtype,
                                  const void* x, const void* grad, void* grad_values, void* workspace,
                                  cudaStream_t stream);

}  // namespace exssnet::cuda
