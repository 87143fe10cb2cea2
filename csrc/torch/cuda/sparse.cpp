// sparse_linear, sparse_conv2d and their backward operators, for the kernels of csrc/cuda/sparse.
#include "cuda/sparse.h"

#include "torch/cuda/launch.h"
#include "torch/sparse_operators.h"

namespace exssnet {
namespace {

// x in a dtype, with the batch innermost: x itself if it is stored so, else a copy.
Tensor innermost(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype && stored_innermost(x)) return x;
  return aten("aten::copy_", "", new_batch_last(x, shape_of(x), dtype), x, false);
}

struct Cuda {
  static ScalarType dtype(const Tensor& x) { return x.scalar_type(); }

  static void check_place(const char* who, const Tensor& x, const Weights::Tensors& tensors) {
    for (const Tensor* t : tensors) check(same_device(*t, x), who, "values and a pattern on the device of x");
  }

  static Tensor output(const SparseWeight& w, const Convolution& c, const Tensor& x, const Following& then) {
    const OnDevice device(w.who, x);
    check_sizes(w, c);
    const Ints shape = output_shape(c, x);
    const OptTensor scale = of_outputs(w, c, x, then.scale), bias = of_outputs(w, c, x, then.bias);
    OptTensor residual;
    if (then.residual) {
      check(shape_of(*then.residual) == shape && same_device(*then.residual, x), w.who,
            "a residual in the output's shape, on the device of x");
      residual = innermost(*then.residual, w.dtype);
    }
    Tensor y = new_batch_last(x, shape, w.dtype);
    if (y.numel() == 0) return y;
    const Tensor from = innermost(x, w.dtype);
    const cuda::SparseEpilogue epilogue{data(scale), data(bias), data(residual), then.relu};
    device.launched(cuda::sparse_forward(c, w.pattern, values(w), epilogue, float_type(x, w.who), from.const_data_ptr(),
                                         y.mutable_data_ptr(), device.processors(), device.stream()));
    return y;
  }

  static Tensor input_gradient(const SparseWeight& w, const Convolution& c, const Tensor& x, const Tensor& grad) {
    const OnDevice device(w.who, x);
    check_sizes(w, c);
    check(same_device(grad, x), w.who, "a gradient on the device of x");
    Tensor grad_x = new_batch_last(x, shape_of(x), w.dtype);
    if (grad_x.numel() == 0) return grad_x;
    const Tensor from = innermost(grad, w.dtype);
    device.launched(cuda::sparse_input_gradient(c, w.transposed, values(w), float_type(x, w.who), from.const_data_ptr(),
                                                grad_x.mutable_data_ptr(), device.processors(), device.stream()));
    return grad_x;
  }

  static Tensor value_gradient(const SparseWeight& w, const Convolution& c, const Tensor& x, const Tensor& grad) {
    const OnDevice device(w.who, x);
    check_sizes(w, c);
    check(same_device(grad, x), w.who, "a gradient on the device of x");
    const int64_t count = w.free.numel();
    Tensor grad_values = torch::stable::new_empty(w.free, {count});
    if (count == 0) return grad_values;
    const Tensor from = innermost(x, w.dtype), lines = innermost(grad, w.dtype);
    const Float type = float_type(x, w.who);
    const auto bytes = static_cast<int64_t>(cuda::sparse_workspace_bytes(c, w.pattern, count, type));
    Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    device.launched(cuda::sparse_value_gradient(c, w.pattern, count, type, from.const_data_ptr(),
                                                lines.const_data_ptr(), grad_values.mutable_data_ptr(),
                                                workspace.mutable_data_ptr(), device.stream()));
    return grad_values;
  }

 private:
  static const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

  static cuda::SparseValues values(const SparseWeight& w) {
    const int64_t free = w.free.numel();
    return {w.free.const_data_ptr(), w.frozen.const_data_ptr(), free, free + w.frozen.numel()};
  }

  // A scale or bias, in the dtype of the kernel.
  static OptTensor of_outputs(const SparseWeight& w, const Convolution& c, const Tensor& x, const OptTensor& t) {
    if (!t) return t;
    check(t->dim() == 1 && t->numel() == c.out_channels && same_device(*t, x), w.who,
          "a scale and a bias for every output, on the device of x");
    return row_major(to_dtype(*t, w.dtype));
  }

  // The kernels count pixels in int32.
  static void check_sizes(const SparseWeight& w, const Convolution& c) {
    constexpr int64_t most = 1 << 28;
    for (const Window& v : {c.h, c.w})
      check(v.in < most && v.padding < most && v.stride < most && v.dilation * (v.taps - 1) < most, w.who,
            "images, padding, stride and kernels of fewer than 2^28 pixels a side");
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CUDA, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear<Cuda>));
  m.impl("sparse_linear_backward", TORCH_BOX(&sparse_linear_backward<Cuda>));
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d<Cuda>));
  m.impl("sparse_conv2d_folded", TORCH_BOX(&sparse_conv2d_folded<Cuda>));
  m.impl("sparse_conv2d_backward", TORCH_BOX(&sparse_conv2d_backward<Cuda>));
}

}  // namespace exssnet
