// Products of a sparse matrix with images: linear layers and convolutions, forward and backward, by the same loops.
//
// Images are stored (C, H, W, N), the batch innermost, so that a kept weight meets whole vectors of images. All three
// products go tile by tile: of a block of channels, the patch of pixels that a tile of outputs reads is copied, padded
// and with stride and dilation resolved, to where it stays in a near cache; there every kept weight of the block,
// of every row, meets it:
//
//   y[o][tile] = sum over the entries k of row o of value[k] * patch[offset[k] + tile]
//
// The input's gradient is the same product with the transposed pattern; the gradient of a value is the inner product
// of the same lines. A linear layer is the convolution of a 1 x 1 image; where its batch is a few full vectors, nothing is
// copied: each kept weight meets a line of x where it lies. T is float or double.
#pragma once

#include "core/pattern.h"

namespace exssnet::cpu {

template <class T>
struct Values {
  const T *free, *frozen;
  int64_t free_count, count;  // count: free and frozen
};

// What becomes of a finished sum of channel o: sum * scale[o] + bias[o] + residual (stored like the output), then
// ReLU. All but `relu` may be null.
template <class T>
struct Epilogue {
  const T *scale = nullptr, *bias = nullptr, *residual = nullptr;
  bool relu = false;

  bool is_plain() const { return !scale && !bias && !residual && !relu; }
};

// The products return false, with nothing but memory of the result written, if the pattern has a pointer, index or
// slot that may not be followed, or indices that do not ascend in a row. The pattern is (O, C * R * S); `transposed` is that
// of the weight (C, O, R, S).

// y (O, H', W', N) from x (C, H, W, N).
template <class T>
bool sparse_forward(const Convolution& c, const Pattern& pattern, const Values<T>& values, const Epilogue<T>& epilogue,
                    const T* x, T* y);

// grad_x (C, H, W, N) from grad (O, H', W', N).
template <class T>
bool sparse_input_gradient(const Convolution& c, const Pattern& transposed, const Values<T>& values, const T* grad,
                           T* grad_x);

// grad_values (free_count,) from x (C, H, W, N) and grad (O, H', W', N). An entry is summed in an order that does not
// depend on the number of threads.
template <class T>
bool sparse_value_gradient(const Convolution& c, const Pattern& pattern, int64_t free_count, int64_t count, const T* x,
                           const T* grad, T* grad_values);

}  // namespace exssnet::cpu
