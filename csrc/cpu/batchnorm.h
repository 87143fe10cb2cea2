// Batch norm, then the addition of a residual, then ReLU, each optional: one pass over memory for all of them.
#pragma once

#include <cstdint>

namespace exssnet::cpu {

// y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual), where a channel is one row of x.
template <class T>
struct BatchNorm {
  int64_t channels, size;  // of x: a contiguous row of `size` elements for each channel
  const T *weight, *bias;  // (channels); null: 1 and 0
  double eps;
  bool relu;
};

// mean and var (channels), the biased variance, are read where `given`, else computed from x. residual may be null.
template <class T>
void batch_norm(const BatchNorm<T>& norm, const T* x, const T* residual, bool given, T* mean, T* var, T* y);

// Gradients of x, the residual, weight and bias; null for those that are not asked for. y: the output, with ReLU after
// a residual, else null. training: mean and var came from x.
template <class T>
void batch_norm_gradients(const BatchNorm<T>& norm, const T* grad, const T* x, const T* y, const T* mean, const T* var,
                          bool training, T* grad_x, T* grad_residual, T* grad_weight, T* grad_bias);

}  // namespace exssnet::cpu
