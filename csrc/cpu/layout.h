// Copies images into another order of dimensions.
#pragma once

#include <cstdint>

#include "core/floats.h"

namespace exssnet::cpu {

struct Strides {
  int64_t n, c, h, w;
};

// Copies (N, C, H, W) of any strides into the order (C, H, W, N). T is float, double, or uint16_t for any 2 bytes.
template <class T>
void batch_innermost(const T* x, const Strides& strides, int64_t n, int64_t c, int64_t h, int64_t w, T* to);

// Copies (C, pixels, N) into the order (N, pixels, C). F is T, or bfloat16 if T is float.
template <class F, class T>
void channels_innermost(const F* x, int64_t c, int64_t pixels, int64_t n, T* to);

}  // namespace exssnet::cpu
