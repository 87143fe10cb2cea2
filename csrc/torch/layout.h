// The memory layout of the CPU kernels: (C, H, W, N), the batch innermost.
#pragma once

#include <algorithm>

#include "torch/checks.h"
#include "cpu/layout.h"

namespace exssnet {

inline Ints shape_of(const Tensor& t) { return Ints(t.sizes().begin(), t.sizes().end()); }

// A new tensor (N, C, H, W) or (B, I), stored with dimension 0 innermost.
inline Tensor new_batch_last(const Tensor& like, const Ints& shape, ScalarType dtype) {
  Ints strides(shape.size(), 1);
  int64_t step = std::max<int64_t>(shape[0], 1);
  for (size_t i = shape.size() - 1; i > 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(shape[i], 1);
  }
  return aten("aten::new_empty_strided", "", like, shape, strides, std::optional(dtype), std::nullopt, std::nullopt,
              std::nullopt);
}

// Whether x (N, C, ...) is stored as (C, ..., N). Dimensions of size 1 are ignored.
inline bool stored_innermost(const Tensor& x) {
  if (x.size(0) != 1 && x.stride(0) != 1) return false;
  for (int64_t d = x.dim() - 1, step = x.size(0); d > 0; step *= x.size(d--))
    if (x.size(d) != 1 && x.stride(d) != step) return false;
  return true;
}

// Whether x (N, C, ...) is stored as (N, ..., C). Dimensions of size 1 are ignored.
inline bool stored_channels_last(const Tensor& x) {
  int64_t step = x.size(1);
  if (step != 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (x.size(d) != 1 && x.stride(d) != step) return false;
    step *= x.size(d);
  }
  return true;
}

// A new tensor (N, C, H, W), stored (N, H, W, C).
inline Tensor new_channels_last(const Tensor& like, const Ints& shape, ScalarType dtype) {
  const int64_t c = shape[1], w = shape[3];
  return aten("aten::new_empty_strided", "", like, shape, Ints{shape[2] * w * c, 1, w * c, c}, std::optional(dtype),
              std::nullopt, std::nullopt, std::nullopt);
}

// Calls body(T*) for a type of 2, 4 or 8 bytes that the kernels of cpu/layout copy.
template <class Body>
void with_size(int64_t bytes, const Body& body) {
  if (bytes == 2) body(static_cast<uint16_t*>(nullptr));
  else if (bytes == 4) body(static_cast<float*>(nullptr));
  else body(static_cast<double*>(nullptr));
}

// x with the batch innermost: x itself if it is stored so, else a copy.
inline Tensor batch_innermost(const Tensor& x) {
  if (stored_innermost(x)) return x;
  const bool is_linear = x.dim() == 2;
  const int64_t n = x.size(0), c = x.size(1), h = is_linear ? 1 : x.size(2), w = is_linear ? 1 : x.size(3);
  Tensor copy = torch::stable::new_empty(x, {c * h * w * n});
  with_size(x.element_size(), [&]<class T>(T*) {
    const T* const from = static_cast<const T*>(x.const_data_ptr());
    T* const to = static_cast<T*>(copy.mutable_data_ptr());
    if (is_linear)  // features are copied like the pixels of a row of an image
      cpu::batch_innermost(from, {x.stride(0), 0, 0, x.stride(1)}, n, 1, 1, c, to);
    else
      cpu::batch_innermost(from, {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, n, c, h, w, to);
  });
  return copy;
}

}  // namespace exssnet
