// topk_masks: PyTorch meets csrc/cpu/topk.
#include "cpu/topk.h"

#include "checks.h"

namespace exssnet {
namespace {

std::tuple<std::vector<Tensor>, Tensor, Tensor> topk_masks(const std::vector<Tensor>& scores, const Ints& k,
                                                           const OptTensor& hint, bool with_masks) {
  const auto count = static_cast<int64_t>(scores.size());
  check(count > 0 && k.size() == scores.size(), "topk_masks", "one k for each of at least one score tensor");
  std::vector<Tensor> flat, masks;
  const Tensor selection = torch::stable::new_empty(scores[0], {count, 2}, ScalarType::Long);
  const Tensor new_hint = torch::stable::new_empty(scores[0], {count, 2}, ScalarType::Long);
  OptTensor old_hint;
  if (hint) {
    check(hint->scalar_type() == ScalarType::Long && same_shape(*hint, selection) && hint->is_cpu(), "topk_masks",
          "an int64 hint (layers, 2)");
    old_hint = row_major(*hint);
  }
  std::vector<cpu::TopkLayer> layers;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& s = scores[i];
    check(s.is_cpu() && 0 <= k[i] && k[i] <= s.numel() && s.numel() < int64_t{1} << 33, "topk_masks",
          "CPU scores of fewer than 2^33 entries and k among them");
    flat.push_back(row_major(s));
    uint8_t* mask = nullptr;
    if (with_masks) {
      masks.push_back(like(s, ScalarType::Bool));
      mask = static_cast<uint8_t*>(masks.back().mutable_data_ptr());
    }
    layers.push_back({flat.back().const_data_ptr(), float_type(s, "topk_masks"), s.numel(), k[i], mask,
                      old_hint ? old_hint->const_data_ptr<int64_t>() + 2 * i : nullptr,
                      selection.mutable_data_ptr<int64_t>() + 2 * i, new_hint.mutable_data_ptr<int64_t>() + 2 * i});
  }
  const cpu::Place nan = cpu::topk_masks(layers);
  if (nan.layer >= 0)
    throw std::runtime_error("topk_masks: scores[" + std::to_string(nan.layer) + "] holds NaN, first at flat index " +
                             std::to_string(nan.index));
  return {std::move(masks), selection, new_hint};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) { m.impl("topk_masks", TORCH_BOX(&topk_masks)); }

}  // namespace exssnet
