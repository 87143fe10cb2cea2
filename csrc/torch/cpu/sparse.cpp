// sparse_linear, sparse_conv2d and their backward operators, for the kernels of csrc/cpu/sparse.
#include "torch/sparse_operators.h"

namespace exssnet {
namespace {

struct Cpu {
  static ScalarType dtype(const Tensor& x) { return compute_dtype(x); }

  static void check_place(const char*, const Tensor&, const Weights::Tensors&) {}

  static Tensor output(const SparseWeight& w, const Convolution& c, const Tensor& x, const Following& then) {
    return sparse_output(w, c, x, then);
  }

  static Tensor input_gradient(const SparseWeight& w, const Convolution& c, const Tensor& x, const Tensor& grad) {
    return sparse_input_gradient(w, c, x, grad);
  }

  static Tensor value_gradient(const SparseWeight& w, const Convolution& c, const Tensor& x, const Tensor& grad) {
    Tensor grad_values = torch::stable::new_empty(w.free, {w.free.numel()}, w.dtype);
    if (grad_values.numel() > 0)
      with_types(x, [&]<class T, class S>(T*, S*) {
        const Tensor from = stored(x, x), lines = stored(grad, x);
        w.followed(cpu::sparse_value_gradient(c, w.pattern, w.free.numel(), w.values<T>().count, data<S>(from),
                                              data<S>(lines), grad_values.mutable_data_ptr<T>()));
      });
    return grad_values;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear<Cpu>));
  m.impl("sparse_linear_backward", TORCH_BOX(&sparse_linear_backward<Cpu>));
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d<Cpu>));
  m.impl("sparse_conv2d_folded", TORCH_BOX(&sparse_conv2d_folded<Cpu>));
  m.impl("sparse_conv2d_backward", TORCH_BOX(&sparse_conv2d_backward<Cpu>));
}

}  // namespace exssnet
