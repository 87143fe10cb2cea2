// topk_masks, for the kernels of csrc/cuda/topk. kernels/cuda_selection.py calls it with the flag for NaN scores.
#include "cuda/topk.h"

#include "torch/cuda/launch.h"
#include "torch/topk_layers.h"

namespace exssnet {
namespace {

std::tuple<std::vector<Tensor>, Tensor, Tensor> topk_masks(const std::vector<Tensor>& scores, const Ints& k,
                                                           const OptTensor& hint, bool with_masks, bool packed,
                                                           const Tensor& nan_flag) {
  TopkLayers made(scores, k, hint, with_masks, packed);
  const OnDevice device("topk_masks", made.selection);
  check(nan_flag.scalar_type() == ScalarType::Int && nan_flag.numel() == 1 && same_device(nan_flag, made.selection),
        "topk_masks", "an int32 flag on the device of the scores");
  const auto bytes = static_cast<int64_t>(cuda::topk_workspace_bytes(made.layers));
  Tensor workspace = torch::stable::new_empty(scores[0], {bytes}, ScalarType::Byte);
  device.launched(cuda::topk_masks(made.layers, nan_flag.mutable_data_ptr<int32_t>(), workspace.mutable_data_ptr(),
                                   device.processors(), device.stream()));
  return {std::move(made.masks), made.selection, made.new_hint};
}

}  // namespace

STABLE_TORCH_LIBRARY(exssnet_cuda, m) {
  m.def("topk_masks(Tensor[] scores, int[] k, Tensor? hint, bool with_masks, bool packed, Tensor(a!) nan_flag) -> "
        "(Tensor[], Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(exssnet_cuda, CUDA, m) { m.impl("topk_masks", TORCH_BOX(&topk_masks)); }

}  // namespace exssnet
