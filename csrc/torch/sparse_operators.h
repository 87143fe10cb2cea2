// The operators sparse_linear, sparse_conv2d and their variants, for any device: checks of their arguments.
//
// A Device has `dtype(x)`, the dtype of a layer's values in a product with x; `check_place(who, x, tensors)`; and the
// products `output(weight, c, x, then)`, `input_gradient(weight, c, x, grad)` and
// `value_gradient(weight, c, x, grad)`.
#pragma once

#include <array>
#include <tuple>

#include "torch/product.h"

namespace exssnet {

// Pattern and values of a layer, from the arguments of its operators. The kernels check indices before they use them.
struct Weights {
  using Tensors = std::array<const Tensor*, 8>;

  const char* who;
  ScalarType dtype, of_gradient;
  Tensor free, frozen, row_ptr, col, slot, row_ptr_t, col_t, slot_t;

  Weights(const char* who, ScalarType dtype, const Tensors& t)
      : who(who), dtype(dtype), of_gradient(t[0]->scalar_type()), free(row_major(*t[0])), frozen(row_major(*t[1])),
        row_ptr(indices(*t[2])), col(indices(*t[3])), slot(indices(*t[4])), row_ptr_t(indices(*t[5])), col_t(indices(*t[6])), slot_t(indices(*t[7])) {
    check(row_ptr.numel() > 0 && row_ptr_t.numel() > 0 && slot.numel() == col.numel() &&
              col_t.numel() == slot_t.numel() && free.numel() + frozen.numel() < kMost,
          who, "a pattern with row pointers and a slot for every entry");
  }

  int64_t rows() const { return row_ptr.numel() - 1; }
  int64_t channels() const { return row_ptr_t.numel() - 1; }

  SparseWeight of(const Convolution& c) const {
    const int64_t taps = c.h.taps * c.w.taps;
    return {who, dtype, of_gradient, view(row_ptr, col, slot, channels() * taps),
            view(row_ptr_t, col_t, slot_t, rows() * taps), to_dtype(free, dtype), to_dtype(frozen, dtype)};
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

template <class Device>
Weights weights_of(const char* who, const Tensor& x, const Weights::Tensors& tensors) {
  float_type(x, who);
  Device::check_place(who, x, tensors);
  return {who, Device::dtype(x), tensors};
}

template <class Device>
std::tuple<Tensor, Tensor> gradients(const SparseWeight& w, const Convolution& c, const Tensor& grad,
                                     const Tensor& x, const Flags& output_mask) {
  check(shape_of(grad) == output_shape(c, x) && output_mask.size() == 2, w.who, "the output's gradient and two flags");
  return {output_mask[0] ? Device::input_gradient(w, c, x, grad) : none_like(x),
          output_mask[1] ? to_dtype(Device::value_gradient(w, c, x, grad), w.of_gradient) : none_like(x)};
}

template <class Device>
Tensor sparse_linear(const Tensor& x, const Tensor& free_values, const Tensor& frozen_values, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& slot, const Tensor& row_ptr_t, const Tensor& col_t,
                     const Tensor& slot_t, const OptTensor& bias) {
  const Weights w = weights_of<Device>(
      "sparse_linear", x, {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  const Convolution c = linear(w.who, x, w.channels(), w.rows());
  return Device::output(w.of(c), c, x, {{}, bias, {}});
}

template <class Device>
std::tuple<Tensor, Tensor> sparse_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& free_values,
                                                  const Tensor& frozen_values, const Tensor& row_ptr, const Tensor& col,
                                                  const Tensor& slot, const Tensor& row_ptr_t, const Tensor& col_t,
                                                  const Tensor& slot_t, const Flags& output_mask) {
  const Weights w = weights_of<Device>(
      "sparse_linear_backward", x, {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  const Convolution c = linear(w.who, x, w.channels(), w.rows());
  return gradients<Device>(w.of(c), c, grad, x, output_mask);
}

template <class Device>
Tensor sparse_conv2d(const Tensor& x, const Tensor& free_values, const Tensor& frozen_values, const Tensor& row_ptr,
                     const Tensor& col, const Tensor& slot, const Tensor& row_ptr_t, const Tensor& col_t,
                     const Tensor& slot_t, const OptTensor& bias, const Ints& kernel_size, const Ints& stride,
                     const Ints& padding, const Ints& dilation) {
  const Weights w = weights_of<Device>(
      "sparse_conv2d", x, {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  const Convolution c = convolution(w.who, x, w.channels(), w.rows(), kernel_size, stride, padding, dilation);
  return Device::output(w.of(c), c, x, {{}, bias, {}});
}

template <class Device>
Tensor sparse_conv2d_folded(const Tensor& x, const Tensor& free_values, const Tensor& frozen_values,
                            const Tensor& row_ptr, const Tensor& col, const Tensor& slot, const Tensor& row_ptr_t,
                            const Tensor& col_t, const Tensor& slot_t, const Tensor& scale, const Tensor& bias,
                            const OptTensor& residual, bool relu, const Ints& kernel_size, const Ints& stride,
                            const Ints& padding, const Ints& dilation) {
  const Weights w = weights_of<Device>(
      "sparse_conv2d_folded", x, {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  const Convolution c = convolution(w.who, x, w.channels(), w.rows(), kernel_size, stride, padding, dilation);
  return Device::output(w.of(c), c, x, {scale, bias, residual, relu});
}

template <class Device>
std::tuple<Tensor, Tensor> sparse_conv2d_backward(const Tensor& grad, const Tensor& x, const Tensor& free_values,
                                                  const Tensor& frozen_values, const Tensor& row_ptr, const Tensor& col,
                                                  const Tensor& slot, const Tensor& row_ptr_t, const Tensor& col_t,
                                                  const Tensor& slot_t, const Ints& kernel_size, const Ints& stride,
                                                  const Ints& padding, const Ints& dilation, const Flags& output_mask) {
  const Weights w = weights_of<Device>(
      "sparse_conv2d_backward", x, {&free_values, &frozen_values, &row_ptr, &col, &slot, &row_ptr_t, &col_t, &slot_t});
  const Convolution c = convolution(w.who, x, w.channels(), w.rows(), kernel_size, stride, padding, dilation);
  return gradients<Device>(w.of(c), c, grad, x, output_mask);
}

}  // namespace exssnet
