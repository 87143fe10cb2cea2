// topk_masks, for the kernels of csrc/cuda/topk. kernels/cuda_selection.py calls it with the flag for NaN scores.
#include "cuda/topk.h"

#include "torch/cuda/launch.h"
#include "torch/topk_layers.h"

namespace exssnet {
namespace {

Tensor topk_masks(const std::vector<Tensor>& scores, const Ints& k, const OptTensor& hint,
                  const std::vector<Tensor>& masks, const Tensor& nan_flag) {
  TopkLayers made("topk_masks", scores, k, hint, masks);
  const OnDevice device("topk_masks", made.selection);
  check(nan_flag.scalar_type() == ScalarType::Int && nan_flag.numel() == 1 && same_device(nan_flag, made.selection),
        "topk_masks", "an int32 flag on the device of the scores");
  const auto bytes = static_cast<int64_t>(cuda::topk_workspace_bytes(made.layers));
  Tensor workspace = torch::stable::new_empty(scores[0], {bytes}, ScalarType::Byte);
  device.launched(cuda::topk_masks(made.layers, nan_flag.mutable_data_ptr<int32_t>(), workspace.mutable_data_ptr(),
                                   device.processors(), device.stream()));
  made.return_hint();
  return made.selection;
}

}  // namespace

STABLE_TORCH_LIBRARY(exssnet_cuda, m) {
  m.def("topk_masks(Tensor[] scores, int[] k, Tensor(a!)? hint, Tensor(b!)[] masks, Tensor(c!) nan_flag) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(exssnet_cuda, CUDA, m) { m.impl("topk_masks", TORCH_BOX(&topk_masks)); }

}  // namespace exssnet
