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

// How the kernels read images: with the channels innermost or the batch; in the dtype of x, except for float16.
struct Storage {
  Tensor of;
  bool channels_last;
  ScalarType dtype;

  explicit Storage(const Tensor& x)
      : of(x), channels_last(!stored_innermost(x) && stored_channels_last(x)),
        dtype(x.scalar_type() == ScalarType::Half ? ScalarType::Float : x.scalar_type()) {}

  bool holds(const Tensor& t) const {
    return t.scalar_type() == dtype && (channels_last ? stored_channels_last(t) : stored_innermost(t));
  }

  Tensor fresh() const {
    if (!channels_last) return new_batch_last(of, shape_of(of), dtype);
    const Ints strides(of.strides().begin(), of.strides().end());
    return aten("aten::new_empty_strided", "", of, shape_of(of), strides, std::optional(dtype), std::nullopt,
                std::nullopt, std::nullopt);
  }

  // t stored so: t itself, or a copy.
  Tensor holding(const Tensor& t) const {
    check(same_shape(t, of) && t.scalar_type() == of.scalar_type() && t.is_cpu(), kWho,
          "CPU tensors of one shape and dtype");
    return holds(t) ? t : copied(t, fresh());
  }
};

// A new tensor in the layout of x, or with the batch innermost, see `empty_in_layout_of` of the reference.
Tensor new_in_layout_of(const Tensor& x) {
  if (x.is_contiguous() || stored_channels_last(x)) return torch::stable::empty_like(x);
  return new_batch_last(x, shape_of(x), x.scalar_type());
}

// A result with x's layout and dtype, and the images to compute it in, which may be the result itself.
struct Result {
  Tensor tensor, images;

  explicit Result(const Storage& storage)
      : tensor(new_in_layout_of(storage.of)), images(storage.holds(tensor) ? tensor : storage.fresh()) {}

  Tensor finished() {
    if (images.data_ptr() != tensor.data_ptr()) torch::stable::copy_(tensor, images);
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
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

int64_t row_size(const Tensor& x) { return x.numel() / std::max<int64_t>(x.size(1), 1); }

template <class T>
cpu::BatchNorm<T> batch_norm_of(const Storage& storage, const OptTensor& weight, const OptTensor& bias, double eps,
                                bool relu) {
  const Tensor& x = storage.of;
  return {x.size(1), row_size(x), data<T>(weight), data<T>(bias), eps, relu, storage.channels_last};
}

// Calls f with a null pointer of the type that images are stored in.
template <class F>
auto with_images(const Tensor& x, const F& f) {
  check(x.dim() >= 2, kWho, "x (N, C, ...)");
  switch (float_type(x, kWho)) {
    case Float::float64: return f(static_cast<double*>(nullptr));
    case Float::bfloat16: return f(static_cast<BFloat16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
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
  return with_images(input, [&]<class S>(S*) {
    using T = Wide<S>;
    const Storage storage(input);
    const Tensor x = storage.holding(input);
    const OptTensor r = residual ? OptTensor(storage.holding(*residual)) : std::nullopt;
    const OptTensor w = per_channel(weight, input), b = per_channel(bias, input);
    check(mean.has_value() == var.has_value(), kWho, "both mean and var, or neither");
    const auto statistic = [&](const OptTensor& given) {
      const Tensor fresh = torch::stable::new_empty(x, {x.size(1)}, wide(x));
      return given ? copied(*per_channel(given, input), fresh) : fresh;
    };
    Tensor m = statistic(mean), v = statistic(var);
    Result y(storage);
    cpu::batch_norm(batch_norm_of<T>(storage, w, b, eps, relu), data<S>(x), data<S>(r), mean.has_value(),
                    mutable_data<T>(m), mutable_data<T>(v), mutable_data<S>(y.images));
    update_running<T>(x, m, v, running_mean, running_var, batches, momentum);
    return std::tuple(y.finished(), m, v);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(
    const Tensor& grad, const Tensor& input, const OptTensor& output, const OptTensor& weight, const OptTensor& bias,
    const Tensor& mean, const Tensor& var, double eps, bool relu, bool training, const Flags& output_mask) {
  check(output_mask.size() == 4, kWho, "four flags");
  return with_images(input, [&]<class S>(S*) {
    using T = Wide<S>;
    const Storage storage(input);
    const Tensor x = storage.holding(input), g = storage.holding(grad);
    const OptTensor y = output && relu ? OptTensor(storage.holding(*output)) : std::nullopt;
    const OptTensor w = per_channel(weight, input), b = per_channel(bias, input), m = per_channel(mean, input),
                    v = per_channel(var, input);
    std::vector<Result> shaped;
    Tensor gradients[4];
    S* of_images[2] = {};
    T* of_channels[2] = {};
    for (int i = 0; i < 2; ++i)
      if (output_mask[i]) of_images[i] = mutable_data<S>(shaped.emplace_back(storage).images);
    for (int i = 2; i < 4; ++i) {
      if (!output_mask[i]) continue;
      gradients[i] = torch::stable::new_empty(x, {x.size(1)}, wide(x));
      of_channels[i - 2] = mutable_data<T>(gradients[i]);
    }
    cpu::batch_norm_gradients(batch_norm_of<T>(storage, w, b, eps, relu), data<S>(g), data<S>(x), data<S>(y),
                              data<T>(m), data<T>(v), training, of_images[0], of_images[1], of_channels[0],
                              of_channels[1]);
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
