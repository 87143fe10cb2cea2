// batch_norm_act and its backward operator, for the kernels of csrc/cpu/batchnorm.
#include "cpu/batchnorm.h"

#include <tuple>

#include "torch/layout.h"

namespace exssnet {
namespace {

constexpr auto kWho = "batch_norm_act";

// The dtype of all arithmetic for x.
ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor copied(const Tensor& t, Tensor to) {
  torch::stable::copy_(to, t);
  return to;
}

// t in the dtype of all arithmetic, each channel one contiguous row: t itself if it is stored so.
Tensor as_rows(const Tensor& t, const Tensor& x) {
  check(same_shape(t, x) && t.scalar_type() == x.scalar_type() && t.is_cpu(), kWho, "CPU tensors of one shape and dtype");
  if (stored_innermost(t) && t.scalar_type() == wide(x)) return t;
  return copied(t, new_batch_last(t, shape_of(t), wide(x)));
}

// Whether x (N, C, ...) is stored as (N, ..., C). Dimensions of size 1 are ignored.
bool stored_channels_last(const Tensor& x) {
  int64_t step = x.size(1);
  if (step != 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (x.size(d) != 1 && x.stride(d) != step) return false;
    step *= x.size(d);
  }
  return true;
}

// A new tensor in the layout of x, or with the batch innermost, see `empty_in_layout_of` of the reference.
Tensor new_in_layout_of(const Tensor& x) {
  if (x.is_contiguous() || stored_channels_last(x)) return torch::stable::empty_like(x);
  return new_batch_last(x, shape_of(x), x.scalar_type());
}

// A result with x's layout and dtype, and the rows to compute it in, which may be the result itself.
struct Result {
  Tensor tensor, rows;

  explicit Result(const Tensor& x) : tensor(new_in_layout_of(x)), rows(tensor) {
    if (!stored_innermost(tensor) || x.scalar_type() != wide(x)) rows = new_batch_last(x, shape_of(x), wide(x));
  }

  Tensor finished() {
    if (rows.data_ptr() != tensor.data_ptr()) torch::stable::copy_(tensor, rows);
    return tensor;
  }
};

OptTensor per_channel(const OptTensor& t, const Tensor& x) {
  if (!t) return t;
  check(t->dim() == 1 && t->size(0) == x.size(1) && t->is_cpu() &&
            (t->scalar_type() == x.scalar_type() || t->scalar_type() == wide(x)),
        kWho, "a number of x's dtype, or of float32, for each channel");
  return t->scalar_type() == wide(x) ? row_major(*t) : copied(*t, like(*t, wide(x)));
}

template <class T>
const T* data(const OptTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

int64_t row_size(const Tensor& x) { return x.numel() / std::max<int64_t>(x.size(1), 1); }

template <class T>
cpu::BatchNorm<T> batch_norm_of(const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
                                bool relu) {
  return {x.size(1), row_size(x), data<T>(weight), data<T>(bias), eps, relu};
}

// Calls f with a null pointer of the type of all arithmetic.
template <class F>
auto with_float(const Tensor& x, const F& f) {
  check(x.dim() >= 2, kWho, "x (N, C, ...)");
  float_type(x, kWho);
  if (wide(x) == ScalarType::Double) return f(static_cast<double*>(nullptr));
  return f(static_cast<float*>(nullptr));
}

// A step of the running statistics. They may have any floating-point dtype and stride.
template <class T>
void update_running(const Tensor& x, const Tensor& mean, const Tensor& var, const OptTensor& running_mean,
                    const OptTensor& running_var, const OptTensor& batches, std::optional<double> momentum) {
  for (const OptTensor& t : {running_mean, running_var})
    check(!t || (t->dim() == 1 && t->size(0) == x.size(1) && t->is_cpu()), kWho, "a running number for each channel");
  check(!batches || (batches->numel() == 1 && batches->scalar_type() == ScalarType::Long && batches->is_cpu()), kWho,
        "the number of batches as one int64");
  check(momentum || batches || !running_mean, kWho, "a momentum, or the number of batches");
  if (batches) ++*batches->mutable_data_ptr<int64_t>();
  if (!running_mean || !running_var || row_size(x) == 0) return;
  const double step = momentum ? *momentum : 1 / double(*batches->const_data_ptr<int64_t>());
  const auto in_place = [&]<class R>(R*, ScalarType dtype) {
    const auto own = [&](const Tensor& t) {
      return t.is_contiguous() && t.scalar_type() == dtype ? t : copied(t, like(t, dtype));
    };
    Tensor m = own(*running_mean), v = own(*running_var);
    cpu::update_running(x.size(1), row_size(x), mean.const_data_ptr<T>(), var.const_data_ptr<T>(), step,
                        m.mutable_data_ptr<R>(), v.mutable_data_ptr<R>());
    if (m.data_ptr() != running_mean->data_ptr()) copied(m, *running_mean);
    if (v.data_ptr() != running_var->data_ptr()) copied(v, *running_var);
  };
  if (wide(*running_mean) == ScalarType::Double) in_place(static_cast<double*>(nullptr), ScalarType::Double);
  else in_place(static_cast<float*>(nullptr), ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(const Tensor& input, const OptTensor& residual,
                                                  const OptTensor& weight, const OptTensor& bias, const OptTensor& mean,
                                                  const OptTensor& var, const OptTensor& running_mean,
                                                  const OptTensor& running_var, const OptTensor& batches,
                                                  std::optional<double> momentum, double eps, bool relu) {
  return with_float(input, [&]<class T>(T*) {
    const Tensor x = as_rows(input, input);
    const OptTensor r = residual ? OptTensor(as_rows(*residual, input)) : std::nullopt;
    const OptTensor w = per_channel(weight, input), b = per_channel(bias, input);
    check(mean.has_value() == var.has_value(), kWho, "both mean and var, or neither");
    const auto statistic = [&](const OptTensor& given) {
      const Tensor fresh = torch::stable::new_empty(x, {x.size(1)});
      return given ? copied(*per_channel(given, input), fresh) : fresh;
    };
    Tensor m = statistic(mean), v = statistic(var);
    Result y(input);
    cpu::batch_norm(batch_norm_of<T>(x, w, b, eps, relu), x.const_data_ptr<T>(), data<T>(r), mean.has_value(),
                    m.mutable_data_ptr<T>(), v.mutable_data_ptr<T>(), y.rows.mutable_data_ptr<T>());
    update_running<T>(x, m, v, running_mean, running_var, batches, momentum);
    return std::tuple(y.finished(), m, v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad, const Tensor& input, const OptTensor& output, const OptTensor& weight, const OptTensor& bias,
    const Tensor& mean, const Tensor& var, double eps, bool relu, bool training, const Flags& output_mask) {
  check(output_mask.size() == 4, kWho, "four flags");
  return with_float(input, [&]<class T>(T*) {
    const Tensor x = as_rows(input, input), g = as_rows(grad, input);
    const OptTensor y = output && relu ? OptTensor(as_rows(*output, input)) : std::nullopt;
    const OptTensor w = per_channel(weight, input), b = per_channel(bias, input), m = per_channel(mean, input),
                    v = per_channel(var, input);
    std::vector<Result> shaped;
    Tensor gradients[4];
    T* to[4] = {};
    for (int i = 0; i < 2; ++i)
      if (output_mask[i]) to[i] = shaped.emplace_back(input).rows.template mutable_data_ptr<T>();
    for (int i = 2; i < 4; ++i) {
      if (!output_mask[i]) continue;
      gradients[i] = torch::stable::new_empty(x, {x.size(1)});
      to[i] = gradients[i].template mutable_data_ptr<T>();
    }
    cpu::batch_norm_gradients(batch_norm_of<T>(x, w, b, eps, relu), g.const_data_ptr<T>(), x.const_data_ptr<T>(),
                              data<T>(y), data<T>(m), data<T>(v), training, to[0], to[1], to[2], to[3]);
    for (int i = 0, next = 0; i < 4; ++i) {
      if (!output_mask[i]) gradients[i] = none_like(input);
      else if (i < 2) gradients[i] = shaped[next++].finished();
      else if (const OptTensor& of = i == 2 ? weight : bias; of && of->scalar_type() != wide(x))
        gradients[i] = copied(gradients[i], like(*of, of->scalar_type()));
    }
    return std::tuple(gradients[0], gradients[1], gradients[2], gradients[3]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace exssnet
