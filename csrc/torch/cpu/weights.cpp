// supermask_weights, write_values and their backward operators, for the kernels of csrc/cpu/weights.
#include "cpu/weights.h"

#include <tuple>

#include "torch/cpu/effective.h"

namespace exssnet {
namespace {

using Tensors = std::vector<Tensor>;

// A new tensor like a weight, contiguous or, for a weight (O, C, R, S), channels_last.
Tensor new_weight(const Tensor& like_this, ScalarType dtype, bool channels_last, const char* who) {
  if (!channels_last) return like(like_this, dtype);
  check(like_this.dim() == 4, who, "a weight (O, C, R, S) where the result is channels_last");
  return new_channels_last(like_this, shape_of(like_this), dtype);
}

Tensors supermask_weights(const Tensors& weights, const Tensors& scores, const Tensors& selections,
                          std::optional<ScalarType> dtype, const Flags& last) {
  constexpr auto kWho = "supermask_weights";
  const size_t count = weights.size();
  check(scores.size() == count && selections.size() == count && last.size() == count, kWho,
        "scores, a selection and a layout for each weight");
  Tensors masked, rows;
  std::vector<MaskOf> masks;
  std::vector<cpu::MaskedWeight> layers;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& w = weights[i];
    rows.push_back(row_major(w));
    masks.push_back(selected(w, scores[i], selections[i], kWho));
    masked.push_back(new_weight(w, dtype.value_or(w.scalar_type()), last[i], kWho));
    layers.push_back({w.numel(), order_of(masked[i]), source(rows[i], kWho), masks[i].mask, target(masked[i], kWho)});
  }
  cpu::masked_weights(layers);
  return masked;
}

std::tuple<Tensors, Tensors> supermask_weights_backward(const Tensors& grads, const Tensors& weights,
                                                        const Tensors& scores, const Tensors& selections,
                                                        const Flags& output_mask) {
  constexpr auto kWho = "supermask_weights_backward";
  const size_t count = weights.size();
  check(grads.size() == count && scores.size() == count && selections.size() == count && output_mask.size() == 2, kWho,
        "a gradient, scores and a selection for each weight, and an output_mask of 2");
  Tensors grad_scores, grad_weights, rows;
  std::vector<MaskOf> masks;
  std::vector<cpu::MaskedGradient> layers;
  const auto row = [&](const Tensor& t, bool as_it_is = false) {
    rows.push_back(as_it_is ? t : row_major(t));
    return source(rows.back(), kWho);
  };
  const auto gradient_of = [&](const Tensor& t, bool asked, Tensors& gradients) {
    if (!asked) return cpu::Floats{nullptr, Float::float32};
    gradients.push_back(like(t, t.scalar_type()));
    return target(gradients.back(), kWho);
  };
  for (size_t i = 0; i < count; ++i) {
    const Tensor &g = grads[i], &w = weights[i], &s = scores[i];
    check(same_shape(g, w) && same_shape(s, w), kWho, "gradients and scores in the weights' shapes");
    masks.push_back(selected(w, s, selections[i], kWho));
    layers.push_back({w.numel(), order_of(g), row(g, is_ordered(g)), row(w), row(s), masks[i].mask,
                      gradient_of(s, output_mask[0], grad_scores), gradient_of(w, output_mask[1], grad_weights)});
  }
  if (output_mask[0] || output_mask[1]) cpu::masked_gradients(layers);
  return {grad_scores, grad_weights};
}

// Values in order, and their places in dense tensors.
struct Placed {
  const char* who;
  Tensors rows;
  std::vector<cpu::PlacedValues> layers;

  Placed(const char* who, const Tensors& dense, const Tensors& values, const Tensors& places) : who(who) {
    check(dense.size() == values.size() && places.size() == values.size(), who, "values and places for each weight");
    for (size_t i = 0; i < dense.size(); ++i) {
      check(dense[i].is_contiguous() || is_ordered(dense[i]), who, "weights that are contiguous or channels_last");
      check(places[i].scalar_type() == ScalarType::Int && places[i].is_cpu() && places[i].numel() == values[i].numel(),
            who, "an int32 place for each value");
      rows.push_back(row_major(places[i]));
      layers.push_back({values[i].numel(), rows.back().const_data_ptr<int32_t>(), dense[i].numel(), {}, {}});
    }
  }
  void followed(bool good) const { check(good, who, "places inside the weights"); }
};

void write_values(const Tensors& values, const Tensors& places, const Tensors& weights) {
  constexpr auto kWho = "write_values";
  Placed placed(kWho, weights, values, places);
  for (size_t i = 0; i < values.size(); ++i) {
    placed.rows.push_back(row_major(values[i]));
    placed.layers[i].from = source(placed.rows.back(), kWho);
    check(weights[i].is_cpu(), kWho, "CPU tensors");
    placed.layers[i].to = target(weights[i], kWho);
  }
  placed.followed(cpu::write_values(placed.layers));
}

Tensors write_values_backward(const Tensors& grads, const Tensors& values, const Tensors& places) {
  constexpr auto kWho = "write_values_backward";
  Placed placed(kWho, grads, values, places);
  Tensors gathered;
  for (size_t i = 0; i < values.size(); ++i) {
    gathered.push_back(like(values[i], values[i].scalar_type()));
    placed.layers[i].from = source(grads[i], kWho);
    placed.layers[i].to = target(gathered[i], kWho);
  }
  placed.followed(cpu::gather_values(placed.layers));
  return gathered;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) {
  m.impl("supermask_weights", TORCH_BOX(&supermask_weights));
  m.impl("supermask_weights_backward", TORCH_BOX(&supermask_weights_backward));
  m.impl("write_values", TORCH_BOX(&write_values));
  m.impl("write_values_backward", TORCH_BOX(&write_values_backward));
}

}  // namespace exssnet
