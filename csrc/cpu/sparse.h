// Products of a sparse matrix with images: linear layers and convolutions, forward and backward, with the same loops.
//
// Images are stored (C, H, W, N), the batch innermost, so that a kept weight is multiplied with full vectors of images.
// All three products work tile by tile. A tile is a part of the output; the pixels that it reads are its patch. The
// patch of a block of channels is copied to a buffer that stays in a near cache. The copy adds the padding and resolves
// stride and dilation. Then all kept weights of the block, of all rows, are multiplied with it:
//
//   y[o][tile] = sum over the entries k of row o of value[k] * patch[offset[k] + tile]
//
// The input's gradient is the same product with the transposed pattern. The gradient of a value is the inner product of
// the same lines. A linear layer is a convolution of 1 x 1 images. If its batch is a few full vectors, there is no
// copy: the kept weights are multiplied with lines of x in place. If it is smaller, see cpu/sparse_few.h.
//
// T, in which everything is computed, is float or double. S, in which images are stored, is T, or bfloat16 if T is
// float. The copy of a patch converts bfloat16, and results are rounded where they are written.
#pragma once

#include "core/floats.h"
#include "core/pattern.h"

namespace exssnet::cpu {

template <class T>
struct Values {
  const T *free, *frozen;
  int64_t free_count, count;  // count: free and frozen
};

// Applied to a finished sum of channel o: sum * scale[o] + bias[o] + residual (stored like the output), then ReLU. All
// pointers may be null.
template <class T, class S = T>
struct Epilogue {
  const T *scale = nullptr, *bias = nullptr;
  const S* residual = nullptr;
  bool relu = false;

  bool is_plain() const { return !scale && !bias && !residual && !relu; }
};

// The products return false if a pointer, index or slot of the pattern is out of range, or the indices of a row do not
// ascend. Then only memory of the result has been written. The pattern is (O, C * R * S); `transposed` is the pattern
// of the weight (C, O, R, S).

// y (O, H', W', N) from x (C, H, W, N).
template <class T, class S>
bool sparse_forward(const Convolution& c, const Pattern& pattern, const Values<T>& values,
                    const Epilogue<T, S>& epilogue, const S* x, S* y);

// grad_x (C, H, W, N) from grad (O, H', W', N).
template <class T, class S>
bool sparse_input_gradient(const Convolution& c, const Pattern& pattern, const Pattern& transposed,
                           const Values<T>& values, const S* grad, S* grad_x);

// grad_values (free_count,) from x (C, H, W, N) and grad (O, H', W', N). The order of each sum does not depend on the
// number of threads.
template <class T, class S>
bool sparse_value_gradient(const Convolution& c, const Pattern& pattern, int64_t free_count, int64_t count, const S* x,
                           const S* grad, T* grad_values);

}  // namespace exssnet::cpu
