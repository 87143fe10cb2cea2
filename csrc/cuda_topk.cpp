// topk_masks: PyTorch meets csrc/cuda/topk. The operator of kernels/cuda_topk.py, with the flag for NaN scores.
#include "cuda/topk.h"

#include "cuda_launch.h"

namespace exssnet {
namespace {

std::tuple<std::vector<Tensor>, Tensor, Tensor> topk_masks(const std::vector<Tensor>& scores, const Ints& k,
                                                           const OptTensor& hint, bool with_masks,
                                                           const Tensor& nan_flag) {
  const auto count = static_cast<int64_t>(scores.size());
  check(count > 0 && k.size() == scores.size(), "topk_masks", "one k for each of at least one score tensor");
  const OnDevice device("topk_masks", scores[0]);
  std::vector<Tensor> flat, masks;
  const Tensor selection = torch::stable::new_empty(scores[0], {count, 2}, ScalarType::Long);
  const Tensor new_hint = torch::stable::new_empty(scores[0], {count, 2}, ScalarType::Long);
  check(nan_flag.scalar_type() == ScalarType::Int && nan_flag.numel() == 1 && same_device(nan_flag, selection),
        "topk_masks", "an int32 flag on the device of the scores");
  OptTensor old_hint;
  if (hint) {
    check(hint->scalar_type() == ScalarType::Long && same_shape(*hint, selection) && same_device(*hint, selection),
          "topk_masks", "an int64 hint (layers, 2) on the device of the scores");
    old_hint = row_major(*hint);
  }
  std::vector<cuda::TopkLayer> layers;
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& s = scores[i];
    check(same_device(s, selection) && 0 <= k[i] && k[i] <= s.numel() && s.numel() < int64_t{1} << 33, "topk_masks",
          "scores of fewer than 2^33 entries on one device and k among them");
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
  const auto bytes = static_cast<int64_t>(cuda::topk_workspace_bytes(layers));
  Tensor workspace = torch::stable::new_empty(scores[0], {bytes}, ScalarType::Byte);
  device.launched(cuda::topk_masks(layers, nan_flag.mutable_data_ptr<int32_t>(), workspace.mutable_data_ptr(),
                                   device.processors(), device.stream()));
  return {std::move(masks), selection, new_hint};
}

}  // namespace

STABLE_TORCH_LIBRARY(exssnet_cuda, m) {
  m.def("topk_masks(Tensor[] scores, int[] k, Tensor? hint, bool with_masks, Tensor(a!) nan_flag) -> "
        "(Tensor[], Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(exssnet_cuda, CUDA, m) { m.impl("topk_masks", TORCH_BOX(&topk_masks)); }

}  // namespace exssnet
