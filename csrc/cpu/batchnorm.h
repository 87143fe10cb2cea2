// Batch norm, addition of a residual and ReLU, each optional, fused into one pass over memory.
#pragma once

#include <cstdint>

#include "core/floats.h"

namespace exssnet::cpu {

// y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual). Images are stored as S (float, double, BFloat16).
// T, the type of all else, is Wide<S>.
template <class T>
struct BatchNorm {
  int64_t channels, size;  // x has `size` elements of each channel
  const T *weight, *bias;  // (channels); null stands for 1 and 0
  double eps;
  bool relu;
  bool channels_last;  // images are (size, channels); otherwise (channels, size)
};

// mean and var (channels) are read if `given`, else computed from x. var is the biased variance. residual may be null.
template <class S>
void batch_norm(const BatchNorm<Wide<S>>& norm, const S* x, const S* residual, bool given, Wide<S>* mean, Wide<S>* var,
                S* y);

// A step of the running statistics (channels) towards those of a batch, with its unbiased variance. Its bits are those
// of torch.lerp with vectors.
template <class T, class R>
void update_running(int64_t channels, int64_t size, const T* mean, const T* var, double step, R* running_mean,
                    R* running_var);

// Gradients of x, residual, weight and bias. Outputs that are not needed are null. y is the output if there is a
// residual and ReLU, else null. training: mean and var were computed from x.
template <class S>
void batch_norm_gradients(const BatchNorm<Wide<S>>& norm, const S* grad, const S* x, const S* y, const Wide<S>* mean,
                          const Wide<S>* var, bool training, S* grad_x, S* grad_residual, Wide<S>* grad_weight,
                          Wide<S>* grad_bias);

}  // namespace exssnet::cpu
