// Prepares tensors for the sparse products of csrc/cpu/sparse: dtypes and the geometry of a layer.
#pragma once

#include <algorithm>
#include <tuple>

#include "cpu/sparse.h"
#include "torch/layout.h"

namespace exssnet {

constexpr int64_t kMost = int64_t(1) << 31;  // limit of every size, so that products of sizes do not overflow int64

// Avoids the dispatcher if the dtype is right already: ten such calls would slow down a small layer.
inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// The dtype of values, scales, biases and sums of the kernels: float32 for float16 and bfloat16.
inline ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Convolution convolution(const char* who, const Tensor& x, int64_t channels, int64_t out_channels,
                                    const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation) {
  check(x.dim() == 4 && kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, who,
        "x (N, C, H, W) and two numbers each of kernel_size, stride, padding and dilation");
  Window windows[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t size = x.size(2 + i);
    check(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 && size < kMost && kernel[i] < kMost &&
              stride[i] < kMost && padding[i] < kMost && dilation[i] < kMost,
          who, "kernel_size, stride and dilation of at least 1, padding of at least 0, all below 2^31");
    const int64_t room = size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    check(size > 0 && room >= 0, who, "an image that, padded, is at least as large as the kernel");
    windows[i] = {size, room / stride[i] + 1, kernel[i], stride[i], padding[i], dilation[i]};
  }
  const Convolution c{x.size(0), x.size(1), out_channels, windows[0], windows[1]};
  check(channels == c.in_channels && double(std::max(out_channels, channels)) * kernel[0] * kernel[1] < kMost, who,
        "a pattern of the C channels, with fewer than 2^31 columns");
  check(double(c.in_channels) * (c.h.in + c.h.padding) * (c.w.in + c.w.padding) * c.batch < 1e15 &&
            double(c.out_channels) * c.h.out * c.w.out * c.batch < 1e15,
        who, "images of fewer than 10^15 elements");
  // Upper limit of the size of a patch (cpu/sparse_tile.h): for each phase 4 lines of 256 elements, and the reach of
  // the taps beyond them for 64 images.
  const double lines = double(c.h.phases()) * (4 + c.h.reach()), pitch = double(c.w.phases()) * (256 + c.w.reach() * 64);
  check(lines * pitch < kMost, who, "a kernel whose patch has fewer than 2^31 elements");
  return c;
}

// A linear layer as a 1 x 1 convolution of 1 x 1 images.
inline Convolution linear(const char* who, const Tensor& x, int64_t features, int64_t out_features) {
  check(x.dim() == 2 && x.size(1) == features, who, "x (B, I) and a pattern with I columns");
  const Window one{1, 1, 1, 1, 0, 1};
  return {x.size(0), x.size(1), out_features, one, one};
}

// A sparse weight: its pattern, and the tensors with its values, of dtype `dtype`. The caller's free values, and so their
// gradient, may have another dtype, `of_gradient`.
struct SparseWeight {
  const char* who;
  ScalarType dtype, of_gradient;
  Pattern pattern, transposed;
  Tensor free, frozen;

  template <class T>
  cpu::Values<T> values() const {
    return {free.const_data_ptr<T>(), frozen.const_data_ptr<T>(), free.numel(), free.numel() + frozen.numel()};
  }
  void followed(bool good) const {
    check(good, who,
          "a pattern whose pointers rise from 0 to the number of entries, whose indices ascend in each row, and whose "
          "indices and slots are in range");
  }
};

// The dtype in which the kernels read and write images like x: that of the sums, or bfloat16.
inline ScalarType stored_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : compute_dtype(x);
}

// Calls body(T*, S*) for the types in which images like x are computed and stored.
template <class Body>
void with_types(const Tensor& x, const Body& body) {
  double* const wide = nullptr;
  float* const single = nullptr;
  switch (stored_dtype(x)) {
    case ScalarType::Double: return body(wide, wide);
    case ScalarType::BFloat16: return body(single, static_cast<BFloat16*>(nullptr));
    default: return body(single, single);
  }
}

// Images like x, as the kernels read them: in their dtype, with the batch innermost.
inline Tensor stored(const Tensor& t, const Tensor& x) { return batch_innermost(to_dtype(t, stored_dtype(x))); }

template <class S>
const S* data(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

inline Ints output_shape(const Convolution& c, const Tensor& x) {
  return x.dim() == 4 ? Ints{c.batch, c.out_channels, c.h.out, c.w.out} : Ints{c.batch, c.out_channels};
}

// The epilogue of a sum: scale and bias of each output, a residual (like the output), ReLU.
struct Following {
  OptTensor scale, bias, residual;
  bool relu = false;
};

// The output of the layer, in x's dtype, with the batch innermost.
inline Tensor sparse_output(const SparseWeight& w, const Convolution& c, const Tensor& x, const Following& then) {
  const Ints shape = output_shape(c, x);
  for (const OptTensor& t : {then.scale, then.bias})
    check(!t || (t->dim() == 1 && t->numel() == c.out_channels), w.who, "a scale and a bias for every output");
  check(!then.residual || shape_of(*then.residual) == shape, w.who, "a residual in the output's shape");
  Tensor y = new_batch_last(x, shape, stored_dtype(x));
  if (y.numel() == 0) return to_dtype(y, x.scalar_type());
  with_types(x, [&]<class T, class S>(T*, S*) {
    const auto as_computed = [&](const OptTensor& t) {
      return t ? OptTensor(row_major(to_dtype(*t, w.dtype))) : std::nullopt;
    };
    const OptTensor scale = as_computed(then.scale), bias = as_computed(then.bias);
    const OptTensor residual = then.residual ? OptTensor(stored(*then.residual, x)) : std::nullopt;
    const Tensor from = stored(x, x);
    const cpu::Epilogue<T, S> epilogue{scale ? data<T>(*scale) : nullptr, bias ? data<T>(*bias) : nullptr,
                                       residual ? data<S>(*residual) : nullptr, then.relu};
    w.followed(cpu::sparse_forward(c, w.pattern, w.values<T>(), epilogue, data<S>(from),
                                   static_cast<S*>(y.mutable_data_ptr())));
  });
  return to_dtype(y, x.scalar_type());
}

// The gradient of x, in x's dtype, with the batch innermost.
inline Tensor sparse_input_gradient(const SparseWeight& w, const Convolution& c, const Tensor& x,
                                    const Tensor& grad) {
  Tensor grad_x = new_batch_last(x, shape_of(x), stored_dtype(x));
  if (grad_x.numel() > 0)
    with_types(x, [&]<class T, class S>(T*, S*) {
      const Tensor from = stored(grad, x);
      w.followed(cpu::sparse_input_gradient(c, w.pattern, w.transposed, w.values<T>(), data<S>(from),
                                            static_cast<S*>(grad_x.mutable_data_ptr())));
    });
  return to_dtype(grad_x, x.scalar_type());
}

}  // namespace exssnet
