// Arguments and results of topk_masks, for any device.
#pragma once

#include "core/topk_layer.h"
#include "torch/checks.h"

namespace exssnet {

// Checks the arguments of topk_masks and allocates its results. `layers` point into these tensors.
struct TopkLayers {
  std::vector<Tensor> flat, masks;
  Tensor selection, new_hint;
  OptTensor old_hint;
  std::vector<TopkLayer> layers;

  // packed: the masks are packed bits. The CPU kernels do not support this.
  TopkLayers(const std::vector<Tensor>& scores, const Ints& k, const OptTensor& hint, bool with_masks, bool packed)
      : selection(rows(scores, k)), new_hint(rows(scores, k)) {
    if (hint) {
      check(hint->scalar_type() == ScalarType::Long && same_shape(*hint, selection) && same_device(*hint, selection),
            "topk_masks", "an int64 hint (layers, 2) on the device of the scores");
      old_hint = row_major(*hint);
    }
    for (size_t i = 0; i < scores.size(); ++i) {
      const Tensor& s = scores[i];
      check(same_device(s, selection) && 0 <= k[i] && k[i] <= s.numel() && s.numel() < int64_t{1} << 33, "topk_masks",
            "scores of fewer than 2^33 entries on one device and k among them");
      flat.push_back(row_major(s));
      uint8_t* mask = nullptr;
      if (with_masks) {
        masks.push_back(packed ? torch::stable::new_empty(s, {(s.numel() + 7) / 8}, ScalarType::Byte)
                               : like(s, ScalarType::Bool));
        mask = static_cast<uint8_t*>(masks.back().mutable_data_ptr());
      }
      layers.push_back({flat.back().const_data_ptr(), float_type(s, "topk_masks"), s.numel(), k[i], mask,
                        old_hint ? old_hint->const_data_ptr<int64_t>() + 2 * i : nullptr,
                        selection.mutable_data_ptr<int64_t>() + 2 * i, new_hint.mutable_data_ptr<int64_t>() + 2 * i,
                        packed});
    }
  }

 private:
  static Tensor rows(const std::vector<Tensor>& scores, const Ints& k) {
    const auto count = static_cast<int64_t>(scores.size());
    check(count > 0 && k.size() == scores.size(), "topk_masks", "one k for each of at least one score tensor");
    return torch::stable::new_empty(scores[0], {count, 2}, ScalarType::Long);
  }
};

}  // namespace exssnet
