// Batch norm, addition of a residual and ReLU, each optional, fused into one pass over memory.
#pragma once

#include <cstdint>

namespace exssnet::cpu {

// y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual). A channel is one row of x.
template <class T>
struct BatchNorm {
  int64_t channels, size;  // x has a contiguous row of `size` elements for each channel
  const T *weight, *bias;  // (channels); null stands for 1 and 0
  double eps;
  bool relu;
};

// mean and var (channels) are read if `given`, else computed from x. var is the biased variance. residual may be null.
template <class T>
void batch_norm(const BatchNorm<T>& norm, const T* x, const T* residual, bool given, T* mean, T* var, T* y);

// A step of the running statistics (channels) towards those of a batch, with its unbiased variance. Its bits are those
// of torch.lerp with vectors.
template <class T, class R>
void update_running(int64_t channels, int64_t size, const T* mean, const T* var, double step, R* running_mean,
                    R* running_var);

// Gradients of x, residual, weight and bias. Outputs that are not needed are null. y is the output if there is a
// residual and ReLU, else null. training: mean and var were computed from x.
template <class T>
void batch_norm_gradients(const BatchNorm<T>& norm, const T* grad, const T* x, const T* y, const T* mean, const T* var,
                          bool training, T* grad_x, T* grad_residual, T* grad_weight, T* grad_bias);

}  // namespace exssnet::cpu
