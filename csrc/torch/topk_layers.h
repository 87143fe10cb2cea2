// Arguments and results of topk_masks, for any device.
#pragma once

#include "core/topk_layer.h"
#include "torch/checks.h"

namespace exssnet {

// Checks the arguments of topk_masks and allocates its result. `layers` point into these tensors.
struct TopkLayers {
  std::vector<Tensor> flat;
  Tensor selection;
  OptTensor hint, rows;  // as given, and in rows
  std::vector<TopkLayer> layers;

  // masks: empty, or one for each score tensor; bool, or packed bits in bytes.
  TopkLayers(const char* who, const std::vector<Tensor>& scores, const Ints& k, const OptTensor& hint,
             const std::vector<Tensor>& masks)
      : selection(selected(who, scores, k)), hint(hint) {
    if (hint) {
      check(hint->scalar_type() == ScalarType::Long && same_shape(*hint, selection) && same_device(*hint, selection),
            who, "an int64 hint (layers, 2) on the device of the scores");
      rows = row_major(*hint);
    }
    check(masks.empty() || masks.size() == scores.size(), who, "a mask for each score tensor, or no masks");
    for (size_t i = 0; i < scores.size(); ++i) {
      const Tensor& s = scores[i];
      check(same_device(s, selection) && 0 <= k[i] && k[i] <= s.numel() && s.numel() < int64_t{1} << 33, who,
            "scores of fewer than 2^33 entries on one device and k among them");
      flat.push_back(row_major(s));
      layers.push_back({flat.back().const_data_ptr(), float_type(s, who), s.numel(), k[i], nullptr,
                        rows ? rows->mutable_data_ptr<int64_t>() + 2 * i : nullptr,
                        selection.mutable_data_ptr<int64_t>() + 2 * i});
      if (!masks.empty()) write_to(who, masks[i], s, layers.back());
    }
  }

  // After the call: a hint of other strides gets its new values.
  void return_hint() {
    if (hint && !hint->is_contiguous()) torch::stable::copy_(*hint, *rows);
  }

 private:
  static Tensor selected(const char* who, const std::vector<Tensor>& scores, const Ints& k) {
    const auto count = static_cast<int64_t>(scores.size());
    check(count > 0 && k.size() == scores.size(), who, "one k for each of at least one score tensor");
    return torch::stable::new_empty(scores[0], {count, 2}, ScalarType::Long);
  }

  static void write_to(const char* who, const Tensor& mask, const Tensor& scores, TopkLayer& layer) {
    layer.packed = mask.scalar_type() == ScalarType::Byte;
    layer.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
    const int64_t bytes = layer.packed ? (scores.numel() + 7) / 8 : scores.numel();
    check((layer.packed || mask.scalar_type() == ScalarType::Bool) && mask.is_contiguous() && mask.numel() == bytes &&
              (!layer.packed || reinterpret_cast<uintptr_t>(layer.mask) % 4 == 0) && same_device(mask, scores),
          who, "contiguous bool masks of the scores' size, or packed ones, aligned to 4 bytes");
  }
};

}  // namespace exssnet
