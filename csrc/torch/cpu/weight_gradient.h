// The gradient of a dense weight, of which every entry is needed, by ATen's products in the fastest of several forms.
#pragma once

#include <chrono>

#include "torch/cpu/supermask.h"

namespace exssnet {

// Whether ATen multiplies bfloat16 faster than float32. It depends on the CPU: some without AMX take twice as long.
// Measured once in a process.
inline bool bfloat16_is_faster(const Tensor& like_this) {
  static const bool faster = [&] {
    double best[2] = {1e9, 1e9};
    for (int round = 0; round < 4; ++round)  // the first one is a warm-up
      for (int i = 0; i < 2; ++i) {
        const ScalarType dtype = i ? ScalarType::BFloat16 : ScalarType::Float;
        const Tensor a = aten("aten::new_zeros", "", like_this, Ints{512, 512}, std::optional(dtype), std::nullopt,
                              std::nullopt, std::nullopt);
        const auto start = std::chrono::steady_clock::now();
        aten("aten::mm", "", a, a);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (round) best[i] = std::min(best[i], seconds.count());
      }
    return best[1] < best[0];
  }();
  return faster;
}

// The dtype in which the products of weight gradients multiply factors like x. float32 holds bfloat16 and float16.
inline ScalarType factor_dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return ScalarType::Float;
    case ScalarType::BFloat16: return bfloat16_is_faster(x) ? ScalarType::BFloat16 : ScalarType::Float;
    default: return x.scalar_type();
  }
}

// The outputs [begin, end) for which a tap reads a pixel of the image, not of the padding.
struct Reached {
  int64_t begin, end, first;  // first: the pixel that output `begin` reads

  Reached(const Window& w, int64_t tap) {
    const int64_t ahead = w.padding - tap * w.dilation;  // output i reads pixel i * stride - ahead
    begin = ahead > 0 ? (ahead + w.stride - 1) / w.stride : 0;
    end = std::max(begin, w.in - 1 + ahead < 0 ? 0 : std::min(w.out, (w.in - 1 + ahead) / w.stride + 1));
    first = begin * w.stride - ahead;
  }
  int64_t count() const { return end - begin; }
};

inline int64_t reached_in_all(const Window& w) {
  int64_t count = 0;
  for (int64_t tap = 0; tap < w.taps; ++tap) count += Reached(w, tap).count();
  return count;
}

// Whether products tap by tap are faster than ATen's convolutions: a quarter of the multiply-adds or more have factors
// in the padding, as in images of 4 x 4 pixels with kernels of 3 x 3, and they take longer than a call for each tap.
inline bool is_mostly_padded(const Convolution& c) {
  constexpr double kWork = 1 << 26;
  const double all = double(c.h.out) * c.h.taps * c.w.out * c.w.taps;
  return double(reached_in_all(c.h)) * reached_in_all(c.w) <= 0.75 * all &&
         all * c.batch * c.in_channels * c.out_channels >= kWork;
}

// The pixels of t (N, C, H, W) from `first` on, in steps, as a matrix (C, pixels * N).
inline Tensor pixels(const Tensor& t, ScalarType dtype, const std::array<int64_t, 2>& first,
                     const std::array<int64_t, 2>& step, const std::array<int64_t, 2>& count) {
  Tensor part = t;
  for (int64_t i = 0; i < 2; ++i)
    part = aten("aten::slice", "Tensor", part, 2 + i, std::optional(first[i]),
                std::optional(first[i] + (count[i] - 1) * step[i] + 1), step[i]);
  part = aten("aten::permute", "", part, Ints{1, 2, 3, 0});
  return aten("aten::view", "", row_major(to_dtype(part, dtype)), Ints{t.size(1), count[0] * count[1] * t.size(0)});
}

// The gradient of the weight (O, C, R, S), stored channels_last: for each tap, a product of the pixels that it reads.
inline Tensor gradient_by_taps(const Tensor& grad, const Tensor& x, const Convolution& c, ScalarType dtype) {
  const int64_t o = c.out_channels, i = c.in_channels, taps = c.h.taps * c.w.taps;
  Tensor weight = new_channels_last(x, {o, i, c.h.taps, c.w.taps}, dtype);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const Reached h(c.h, tap / c.w.taps), w(c.w, tap % c.w.taps);
    Tensor of_tap = aten("aten::as_strided", "", weight, Ints{o, i}, Ints{taps * i, 1}, std::optional(tap * i));
    if (h.count() == 0 || w.count() == 0) {
      torch::stable::zero_(of_tap);
      continue;
    }
    const Tensor from = pixels(x, dtype, {h.first, w.first}, {c.h.stride, c.w.stride}, {h.count(), w.count()});
    const Tensor to = pixels(grad, dtype, {h.begin, w.begin}, {1, 1}, {h.count(), w.count()});
    aten("aten::mm", "out", to, torch::stable::transpose(from, 0, 1), of_tap);
  }
  return weight;
}

// x (N, C, H, W) as ATen's convolutions read it without another copy, in a dtype: channels_last if the batch is
// innermost, otherwise in its own order.
inline Tensor for_convolution(const Tensor& x, ScalarType dtype) {
  const bool narrow = x.scalar_type() == ScalarType::BFloat16 && dtype == ScalarType::Float;
  if (x.dim() != 4 || x.size(0) == 1 || x.is_contiguous() || !stored_innermost(x) ||
      (x.scalar_type() != dtype && !narrow))
    return to_dtype(x, dtype);
  const int64_t n = x.size(0), c = x.size(1), pixels = x.size(2) * x.size(3);
  Tensor to = new_channels_last(x, shape_of(x), dtype);
  if (narrow)
    cpu::channels_innermost(data<BFloat16>(x), c, pixels, n, static_cast<float*>(to.mutable_data_ptr()));
  else
    with_size(x.element_size(), [&]<class T>(T*) {
      cpu::channels_innermost(data<T>(x), c, pixels, n, static_cast<T*>(to.mutable_data_ptr()));
    });
  return to;
}

}  // namespace exssnet
