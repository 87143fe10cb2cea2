// sparse_linear, sparse_conv2d and their backward operators: PyTorch meets csrc/cpu/sparse.
#include "cpu/sparse.h"

#include <algorithm>
#include <array>
#include <tuple>

#include "checks.h"

namespace exssnet {
namespace {

using cpu::Convolution;
using cpu::Epilogue;
using cpu::Pattern;
using cpu::Strides;
using cpu::Values;

constexpr int64_t kMost = int64_t(1) << 31;  // of any size: products of the few that are multiplied stay in int64

// Without a trip through the dispatcher where nothing changes: a small layer would notice ten.
Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// What the kernels compute in: float32 for the half types.
ScalarType compute_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A new tensor (N, C, H, W), or (B, I), with dimension 0 stored innermost.
Tensor new_batch_last(const Tensor& like, const Ints& shape, ScalarType dtype) {
  Ints strides(shape.size(), 1);
  for (size_t i = shape.size() - 1, step = shape[0]; i > 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(shape[i], 1);
  }
  return aten("aten::new_empty_strided", "", like, shape, strides, std::optional(dtype), std::nullopt, std::nullopt,
              std::nullopt);
}

// The pattern and the values of a layer; the kernels check what they follow.
struct Weights {
  const char* who;
  ScalarType dtype;
  Tensor free, frozen, row_ptr, col, slot, row_ptr_t, col_t, slot_t;

  Weights(const char* who, const Tensor& x, const std::array<const Tensor*, 8>& t)
      : who(who), dtype(compute_dtype(x)), free(floats(*t[0])), frozen(floats(*t[1])), row_ptr(indices(*t[2])),
        col(indices(*t[3])), slot(indices(*t[4])), row_ptr_t(indices(*t[5])), col_t(indices(*t[6])),
        slot_t(indices(*t[7])) {
    check(x.scalar_type() == ScalarType::Double || x.scalar_type() == ScalarType::Float ||
              x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
          who, "x of dtype float32, float64, bfloat16 or float16");
    check(row_ptr.numel() > 0 && row_ptr_t.numel() > 0 && col.numel() == slot.numel() &&
              col_t.numel() == slot_t.numel() && free.numel() + frozen.numel() < kMost,
          who, "a pattern with row pointers and a slot for every entry");
  }

  int64_t rows() const { return row_ptr.numel() - 1; }
  int64_t channels() const { return row_ptr_t.numel() - 1; }
  Pattern pattern(int64_t taps) const { return view(row_ptr, col, slot, channels() * taps); }
  Pattern transposed(int64_t taps) const { return view(row_ptr_t, col_t, slot_t, rows() * taps); }

  template <class T>
  Values<T> values() const {
    return {free.const_data_ptr<T>(), frozen.const_data_ptr<T>(), free.numel(), free.numel() + frozen.numel()};
  }

  Tensor floats(const Tensor& t) const { return row_major(to_dtype(t, dtype)); }

  void followed(bool good) const {
    check(good, who,
          "a pattern whose pointers rise from 0 to the number of entries and whose indices and slots are in range");
  }

 private:
  Tensor indices(const Tensor& t) const {
    check(t.scalar_type() == ScalarType::Int && t.dim() == 1, who, "a pattern of flat int32 tensors");
    return row_major(t);
  }

  static Pattern view(const Tensor& ptr, const Tensor& index, const Tensor& slots, int64_t columns) {
    return {ptr.const_data_ptr<int32_t>(), index.const_data_ptr<int32_t>(), slots.const_data_ptr<int32_t>(),
            ptr.numel() - 1, columns, index.numel()};
  }
};

int64_t taps(const Convolution& c) { return c.h.taps * c.w.taps; }

Convolution convolution(const Weights& w, const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& padding,
                        const Ints& dilation) {
  check(x.dim() == 4 && kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, w.who,
        "x (N, C, H, W) and two numbers each of kernel_size, stride, padding and dilation");
  cpu::Window windows[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t size = x.size(2 + i);
    check(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 && size < kMost && kernel[i] < kMost &&
              stride[i] < kMost && padding[i] < kMost && dilation[i] < kMost,
          w.who, "kernel_size, stride and dilation of at least 1, padding of at least 0, all below 2^31");
    const int64_t room = size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    check(size > 0 && room >= 0, w.who, "an image that, padded, is at least as large as the kernel");
    windows[i] = {size, room / stride[i] + 1, kernel[i], stride[i], padding[i], dilation[i]};
  }
  const Convolution c{x.size(0), x.size(1), w.rows(), windows[0], windows[1]};
  check(w.channels() == c.in_channels && double(std::max(w.rows(), c.in_channels)) * kernel[0] * kernel[1] < kMost, w.who,
        "a pattern of the C channels, with fewer than 2^31 columns");
  check(double(c.in_channels) * (c.h.in + c.h.padding) * (c.w.in + c.w.padding) * c.batch < 1e15 &&
            double(c.out_channels) * c.h.out * c.w.out * c.batch < 1e15,
        w.who, "images of fewer than 10^15 elements");
  return c;
}

// A linear layer is the 1 x 1 convolution of 1 x 1 images.
Convolution linear(const Weights& w, const Tensor& x) {
  check(x.dim() == 2 && x.size(1) == w.channels(), w.who, "x (B, I) and a pattern with I columns");
  const cpu::Window one{1, 1, 1, 1, 0, 1};
  return {x.size(0), x.size(1), w.rows(), one, one};
}

// x with the batch innermost: itself where it is stored so, else a copy.
template <class T>
Tensor batch_innermost(const Tensor& x) {
  const bool is_linear = x.dim() == 2;
  const int64_t n = x.size(0), c = x.size(1), h = is_linear ? 1 : x.size(2), w = is_linear ? 1 : x.size(3);
  const Strides strides{x.stride(0), x.stride(1), is_linear ? 1 : x.stride(2), is_linear ? 1 : x.stride(3)};
  const auto dense = [](int64_t size, int64_t stride, int64_t step) { return size == 1 || stride == step; };
  if (dense(n, strides.n, 1) && dense(w, strides.w, n) && dense(h, strides.h, w * n) && dense(c, strides.c, h * w * n))
    return x;
  Tensor copy = torch::stable::new_empty(x, {c * h * w * n});
  if (is_linear)  // the features as pixels of a line, which can be copied like a row of an image
    cpu::batch_innermost(x.const_data_ptr<T>(), {strides.n, 0, 0, strides.c}, n, 1, 1, c, copy.mutable_data_ptr<T>());
  else
    cpu::batch_innermost(x.const_data_ptr<T>(), strides, n, c, h, w, copy.mutable_data_ptr<T>());
  return copy;
}

Ints shape_of(const Tensor& t) { return Ints(t.sizes().begin(), t.sizes().end()); }

template <class T>
Tensor forward(const Weights& w, const Convolution& c, const Tensor& x, const OptTensor& bias) {
  check(!bias || bias->numel() == c.out_channels, w.who, "a bias for every output");
  Ints shape{c.batch, c.out_channels};
  if (x.dim() == 4) shape.insert(shape.end(), {c.h.out, c.w.out});
  Tensor y = new_batch_last(x, shape, w.dtype);
  if (y.numel() == 0) return y;
  const Tensor from = batch_innermost<T>(to_dtype(x, w.dtype));
  const OptTensor offset = bias ? OptTensor(w.floats(*bias)) : std::nullopt;
  Epilogue<T> epilogue;
  if (offset) epilogue.bias = offset->const_data_ptr<T>();
  w.followed(cpu::sparse_forward(c, w.pattern(taps(c)), w.values<T>(), epilogue, from.const_data_ptr<T>(),
                                 y.mutable_data_ptr<T>()));
  return y;
}

template <class T>
Tensor input_gradient(const Weights& w, const Convolution& c, const Tensor& x, const Tensor& grad) {
  Tensor grad_x = new_batch_last(x, shape_of(x), w.dtype);
  if (grad_x.numel() == 0) return grad_x;
  const Tensor from = batch_innermost<T>(grad);
  w.followed(cpu::sparse_input_gradient(c, w.transposed(taps(c)), w.values<T>(), from.const_data_ptr<T>(),
                                        grad_x.mutable_data_ptr<T>()));
  return grad_x;
}

template <class T>
Tensor value_gradient(const Weights& w, const Convolution& c, const Tensor& x, const Tensor& grad) {
  Tensor grad_values = torch::stable::new_empty(w.free, {w.free.numel()});
  if (grad_values.numel() == 0) return grad_values;
  const Tensor from = batch_innermost<T>(x), lines = batch_innermost<T>(grad);
  w.followed(cpu::sparse_value_gradient(c, w.pattern(taps(c)), w.free.numel(), w.values<T>().count,
                                        from.const_data_ptr<T>(), lines.const_data_ptr<T>(),
                                        grad_values.mutable_data_ptr<T>()));
  return grad_values;
}

Tensor run_forward(const Weights& w, const Convolution& c, const Tensor& x, const OptTensor& bias) {
  return to_dtype(w.dtype == ScalarType::Double ? forward<double>(w, c, x, bias) : forward<float>(w, c, x, bias),
                  x.scalar_type());
}

std::tuple<Tensor, Tensor> run_backward(const Weights& w, const Convolution& c, const Tensor& grad, const Tensor& x,
                                        const Flags& output_mask) {
  Ints expected{c.batch, c.out_channels};
  if (x.dim() == 4) expected.insert(expected.end(), {c.h.out, c.w.out});
  check(shape_of(grad) == expected && output_mask.size() == 2, w.who, "the output's gradient and two flags");
  const Tensor g = to_dtype(grad, w.dtype), from = to_dtype(x, w.dtype);
  const auto run = [&](bool wanted, auto* as_double, auto* as_float) {
    if (!wanted) return none_like(x);
    return to_dtype((w.dtype == ScalarType::Double ? as_double : as_float)(w, c, from, g), x.scalar_type());
  };
  return {run(output_mask[0], input_gradient<double>, input_gradient<float>),
          run(output_mask[1], value_gradient<double>, value_gradient<float>)};
}

Tensor sparse_linear(const Tensor& x, const Tensor& free_values, const Tensor& frozen_values, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& slot, const Tensor& row_ptr_t, const Tensor& col_t,
                     const Tensor& slot_t, const OptTensor& bias) {
  const Weights w("sparse_linear", x, {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  return run_forward(w, linear(w, x), x, bias);
}

std::tuple<Tensor, Tensor> sparse_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& free_values,
                                                  const Tensor& frozen_values, const Tensor& row_ptr, const Tensor& col,
                                                  const Tensor& slot, const Tensor& row_ptr_t, const Tensor& col_t,
                                                  const Tensor& slot_t, const Flags& output_mask) {
  const Weights w("sparse_linear_backward", x,
                  {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  return run_backward(w, linear(w, x), grad, x, output_mask);
}

Tensor sparse_conv2d(const Tensor& x, const Tensor& free_values, const Tensor& frozen_values, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& slot, const Tensor& row_ptr_t, const Tensor& col_t,
                     const Tensor& slot_t, const OptTensor& bias, const Ints& kernel_size, const Ints& stride,
                     const Ints& padding, const Ints& dilation) {
  const Weights w("sparse_conv2d", x, {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  return run_forward(w, convolution(w, x, kernel_size, stride, padding, dilation), x, bias);
}

std::tuple<Tensor, Tensor> sparse_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& free_values,
                                                  const Tensor& frozen_values, const Tensor& row_ptr, const Tensor& col,
                                                  const Tensor& slot, const Tensor& row_ptr_t, const Tensor& col_t,
                                                  const Tensor& slot_t, const Ints& kernel_size, const Ints& stride,
                                                  const Ints& padding, const Ints& dilation, const Flags& output_mask) {
  const Weights w("sparse_conv2d_backward", x,
                  {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  return run_backward(w, convolution(w, x, kernel_size, stride, padding, dilation), grad, x, output_mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("sparse_linear_backward", TORCH_BOX(&sparse_linear_backward));
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("sparse_conv2d_backward", TORCH_BOX(&sparse_conv2d_backward));
}

}  // namespace exssnet
