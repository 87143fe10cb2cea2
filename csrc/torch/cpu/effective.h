// Shared by the dense products with a mask: the effective weight before them, and the gradients after them.
#pragma once

#include <tuple>

#include "cpu/epilogue.h"
#include "cpu/weights.h"
#include "torch/layout.h"

namespace exssnet {

// A mask over a weight, which owns its memory.
struct MaskOf {
  Tensor data;
  cpu::Mask mask;
};

inline MaskOf given(const Tensor& weight, const Tensor& mask, const char* who) {
  const bool bytes = mask.scalar_type() == ScalarType::Bool;
  check(mask.is_cpu() && (bytes ? same_shape(mask, weight)
                                : mask.scalar_type() == ScalarType::Byte && mask.numel() == (weight.numel() + 7) / 8),
        who, "a bool mask in the weight's shape, or one byte for every 8 weights");
  MaskOf m{row_major(mask), {}};
  m.mask.form = bytes ? cpu::Mask::Form::bytes : cpu::Mask::Form::bits;
  m.mask.data = m.data.const_data_ptr();
  return m;
}

// The mask of a selection: packed bits, or scores compared with a threshold (a row of topk_masks).
inline MaskOf selected(const Tensor& weight, const Tensor& scores, const Tensor& selection, const char* who) {
  if (selection.scalar_type() == ScalarType::Byte) return given(weight, selection, who);
  check(same_shape(scores, weight) && selection.numel() == 2 && selection.scalar_type() == ScalarType::Long &&
            scores.is_cpu() && selection.is_cpu(),
        who, "scores in the weight's shape and two int64 that select from them");
  float_type(scores, who);
  MaskOf m{row_major(scores), {}};
  const Tensor pair = row_major(selection);
  const int64_t* p = pair.const_data_ptr<int64_t>();
  m.mask = {cpu::Mask::Form::selection, m.data.const_data_ptr(), static_cast<int>(scores.element_size()), p[0], p[1]};
  return m;
}

// The effective weight: the weight where the mask keeps it, else 0; contiguous.
inline Tensor effective(const Tensor& weight, const MaskOf& mask, const char* who) {
  float_type(weight, who);
  const Tensor w = row_major(weight);
  Tensor out = like(w, w.scalar_type());
  cpu::keep(w.const_data_ptr(), static_cast<int>(w.element_size()), w.numel(), mask.mask, {}, out.mutable_data_ptr());
  return out;
}

inline cpu::ConstFloats source(const Tensor& t, const char* who) {
  check(t.is_cpu(), who, "CPU tensors");
  return {t.const_data_ptr(), float_type(t, who)};
}
inline cpu::Floats target(const Tensor& t, const char* who) { return {t.mutable_data_ptr(), float_type(t, who)}; }

// Whether a weight (O, C, R, S) is stored channels_last and not contiguous.
inline bool is_ordered(const Tensor& t) { return t.dim() == 4 && !t.is_contiguous() && stored_channels_last(t); }

inline cpu::Order order_of(const Tensor& t) {
  return is_ordered(t) ? cpu::Order{t.size(1), t.size(2) * t.size(3)} : cpu::Order{};
}

// The gradients of (scores, weight) from the gradient of the effective weight, of any dtype.
inline std::tuple<Tensor, Tensor> supermask_gradients(const Tensor& grad_effective, const Tensor& weight,
                                                      const Tensor& scores, const MaskOf& mask,
                                                      const Flags& output_mask, const char* who) {
  const bool need_scores = output_mask[1], need_weight = output_mask[2];
  Tensor grad_scores = need_scores ? like(scores, scores.scalar_type()) : none_like(scores);
  Tensor grad_weight = need_weight ? like(weight, weight.scalar_type()) : none_like(weight);
  if (!need_scores && !need_weight) return {grad_scores, grad_weight};
  const Tensor grad = is_ordered(grad_effective) ? grad_effective : row_major(grad_effective);
  check(same_shape(grad, weight) && same_shape(scores, weight), who, "a gradient and scores in the weight's shape");
  const Tensor w = row_major(weight), s = row_major(scores);
  const cpu::Floats none{nullptr, Float::float32};
  cpu::masked_gradients({{w.numel(), order_of(grad), source(grad, who), source(w, who), source(s, who), mask.mask,
                          need_scores ? target(grad_scores, who) : none,
                          need_weight ? target(grad_weight, who) : none}});
  return {grad_scores, grad_weight};
}

// The gradient of the weight from the gradient of the effective weight, which is a new tensor and is overwritten.
inline Tensor masked_gradient(const Tensor& grad_effective, const Tensor& weight, const MaskOf& mask,
                              const OptTensor& free_mask, const char* who) {
  Tensor grad = row_major(grad_effective);
  check(same_shape(grad, weight) && grad.scalar_type() == weight.scalar_type(), who, "a gradient like the weight");
  const MaskOf free = free_mask ? given(weight, *free_mask, who) : MaskOf{mask.data, {}};
  cpu::keep(grad.const_data_ptr(), static_cast<int>(grad.element_size()), grad.numel(), mask.mask, free.mask,
            grad.mutable_data_ptr());
  return grad;
}

}  // namespace exssnet
