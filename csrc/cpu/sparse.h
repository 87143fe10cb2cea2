// Products of a sparse matrix with images: linear layers and convolutions, forward and backward, by the same loops.
//
// Images are stored (C, H, W, N), the batch innermost, so a kept weight meets whole vectors. A convolution reads its
// input from a packed copy in which stride, padding and dilation have become plain offsets:
//
//   y[o][l][j] = bias[o] + sum over the entries k of row o of value[k] * x[offset[k] + l * x_line + j]
//
// for output line l and j over the line's (W, N) pixels, flat. The input's gradient is the same product, with the
// pattern by columns and a packed output gradient. The gradient of a value is the inner product of the same lines.
// A linear layer is the convolution of a 1 x 1 image. T is float or double.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace exssnet::cpu {

// How height or width is stored in a packed image: position i of phase p holds pixel i * stride + phase remainder -
// lead, and zero where there is no such pixel. With stride 1 that is the padded (or cropped) dimension itself.
struct Axis {
  int64_t size, stride, dilation, phases, length, lead;

  int64_t pixel(int64_t phase, int64_t i) const { return i * stride + phase * dilation % stride - lead; }
  bool is_plain() const { return stride == 1 && lead == 0 && length == size; }
};

// Height or width of a convolution. Tap t reads padded pixel i * stride + t * dilation for output i: in the packed
// input that is position i + shift(t) of phase(t).
struct Window {
  int64_t in, out, taps, stride, padding, dilation;

  int64_t phases() const { return std::min(taps, stride / std::gcd(stride, dilation)); }
  int64_t phase(int64_t tap) const { return tap % phases(); }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t reach() const { return shift(taps - 1); }

  Axis input() const { return {in, stride, dilation, phases(), out + reach(), padding}; }
  // The input's gradient, phase by phase; its first position is the first that holds pixels of the image.
  Axis input_gradient() const {
    const int64_t first = padding / stride, length = (in - 1 + padding) / stride - first + 1;
    return {in, stride, dilation, phases(), length, padding - first * stride};
  }
  // The output's gradient, as the product for `input_gradient` reads it: tap t at position i + reach() - shift(t).
  Axis output_gradient() const {
    return {out, 1, 1, 1, input_gradient().length + reach(), reach() - padding / stride};
  }
};

struct Convolution {
  int64_t batch, in_channels, out_channels;
  Window h, w;
};

// Layout (channels, h.phases, w.phases, h.length, w.length, batch).
struct PackedImage {
  static constexpr int64_t kSlack = 16;  // zeros after the end: the last vector of a line may reach so far past it
  int64_t batch, channels;
  Axis h, w;

  int64_t line() const { return w.length * batch; }
  int64_t plane() const { return h.length * line(); }
  int64_t channel() const { return h.phases * w.phases * plane(); }
  int64_t size() const { return channels * channel(); }
};

inline PackedImage packed_input(const Convolution& c) { return {c.batch, c.in_channels, c.h.input(), c.w.input()}; }
inline PackedImage packed_input_gradient(const Convolution& c) {
  return {c.batch, c.in_channels, c.h.input_gradient(), c.w.input_gradient()};
}
inline PackedImage packed_output_gradient(const Convolution& c) {
  return {c.batch, c.out_channels, c.h.output_gradient(), c.w.output_gradient()};
}

struct Strides {
  int64_t n, c, h, w;
};

// Fills image.size() + kSlack elements.
template <class T>
void pack(const T* x, const Strides& strides, const PackedImage& image, T* packed);

// The inverse, into (C, H, W, N); pixels that no phase holds become zero.
template <class T>
void unpack(const T* packed, const PackedImage& image, T* x);

// Compressed rows of a sparse matrix; slot is an entry's place in [free values; frozen values].
struct Pattern {
  const int32_t *ptr, *index, *slot;
  int64_t rows, columns, entries;
};

template <class T>
struct Values {
  const T *free, *frozen;
  int64_t free_count;
};

// Whether every pointer, index and slot of the pattern is one that may be followed.
bool in_range(const Pattern& pattern, int64_t slots);

// y (O, H', W', N) from packed_input(c); bias may be null. The pattern is (O, C * R * S).
template <class T>
void sparse_forward(const Convolution& c, const Pattern& by_rows, const Values<T>& values, const T* bias,
                    const T* packed_x, T* y);

// packed_input_gradient(c) from packed_output_gradient(c). The pattern is the transposed one, (C * R * S, O).
template <class T>
void sparse_input_gradient(const Convolution& c, const Pattern& by_columns, const Values<T>& values,
                           const T* packed_grad, T* grad_x);

// grad_values (free_count,) from packed_input(c) and grad (O, H', W', N). One thread owns an entry and sums in a fixed
// order: the result does not depend on the number of threads.
template <class T>
void sparse_value_gradient(const Convolution& c, const Pattern& by_rows, int64_t free_count, const T* packed_x,
                           const T* grad, T* grad_values);

}  // namespace exssnet::cpu
