// batch_norm_act and its backward operator, for the kernels of csrc/cpu/batchnorm.
#include "cpu/batchnorm.h"

#include <tuple>

#include "torch/layout.h"

namespace exssnet {
namespace {

constexpr auto kWho = "batch_norm_act";

// t itself if each channel is one contiguous row, else a copy.
Tensor as_rows(const Tensor& t, const Tensor& x) {
  check(same_shape(t, x) && t.scalar_type() == x.scalar_type() && t.is_cpu(), kWho,
        "CPU tensors of one shape and dtype, float32 or float64");
  if (stored_innermost(t)) return t;
  Tensor copy = new_batch_last(t, shape_of(t), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

OptTensor per_channel(const OptTensor& t, const Tensor& x) {
  if (!t) return t;
  check(t->dim() == 1 && t->size(0) == x.size(1) && t->scalar_type() == x.scalar_type() && t->is_cpu(), kWho,
        "a number of x's dtype for each channel");
  return row_major(*t);
}

template <class T>
const T* data(const OptTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <class T>
cpu::BatchNorm<T> batch_norm_of(const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
                                bool relu) {
  return {x.size(1), x.numel() / std::max<int64_t>(x.size(1), 1), data<T>(weight), data<T>(bias), eps, relu};
}

// Calls f with a null pointer of x's type.
template <class F>
auto with_float(const Tensor& x, const F& f) {
  check(x.dim() >= 2, kWho, "x (N, C, ...)");
  if (x.scalar_type() == ScalarType::Double) return f(static_cast<double*>(nullptr));
  check(x.scalar_type() == ScalarType::Float, kWho, "x of dtype float32 or float64");
  return f(static_cast<float*>(nullptr));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& input, const OptTensor& residual,
                                                  const OptTensor& weight, const OptTensor& bias, const OptTensor& mean,
                                                  const OptTensor& var, double eps, bool relu) {
  return with_float(input, [&]<class T>(T*) {
    const Tensor x = as_rows(input, input);
    const OptTensor r = residual ? OptTensor(as_rows(*residual, x)) : std::nullopt;
    const OptTensor w = per_channel(weight, x), b = per_channel(bias, x);
    check(mean.has_value() == var.has_value(), kWho, "both mean and var, or neither");
    Tensor m = mean ? torch::stable::clone(*per_channel(mean, x)) : torch::stable::new_empty(x, {x.size(1)});
    Tensor v = var ? torch::stable::clone(*per_channel(var, x)) : torch::stable::new_empty(x, {x.size(1)});
    Tensor y = new_batch_last(x, shape_of(x), x.scalar_type());
    cpu::batch_norm(batch_norm_of<T>(x, w, b, eps, relu), x.const_data_ptr<T>(), data<T>(r), mean.has_value(),
                    m.mutable_data_ptr<T>(), v.mutable_data_ptr<T>(), y.mutable_data_ptr<T>());
    return std::tuple(y, m, v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad, const Tensor& input, const OptTensor& output, const OptTensor& weight, const OptTensor& bias,
    const Tensor& mean, const Tensor& var, double eps, bool relu, bool training, const Flags& output_mask) {
  check(output_mask.size() == 4, kWho, "four flags");
  return with_float(input, [&]<class T>(T*) {
    const Tensor x = as_rows(input, input), g = as_rows(grad, x);
    const OptTensor y = output && relu ? OptTensor(as_rows(*output, x)) : std::nullopt;
    const OptTensor w = per_channel(weight, x), b = per_channel(bias, x), m = per_channel(mean, x),
                    v = per_channel(var, x);
    Tensor gradients[4];
    T* to[4];
    for (int i = 0; i < 4; ++i) {
      gradients[i] = !output_mask[i] ? none_like(x) : i < 2 ? new_batch_last(x, shape_of(x), x.scalar_type()) : torch::stable::new_empty(x, {x.size(1)});
      to[i] = output_mask[i] ? gradients[i].mutable_data_ptr<T>() : nullptr;
    }
    cpu::batch_norm_gradients(batch_norm_of<T>(x, w, b, eps, relu), g.const_data_ptr<T>(), x.const_data_ptr<T>(),
                              data<T>(y), data<T>(m), data<T>(v), training, to[0], to[1], to[2], to[3]);
    return std::tuple(gradients[0], gradients[1], gradients[2], gradients[3]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace exssnet
