// adam_topk, for the kernels of csrc/cuda/adam. kernels/cuda_selection.py calls it with the flag for NaN scores.
#include "cuda/adam.h"

#include "torch/cuda/launch.h"
#include "torch/topk_layers.h"

namespace exssnet {
namespace {

constexpr auto kWho = "adam_topk";
using Tensors = std::vector<Tensor>;

float* floats(const Tensor& t, const Tensor& scores, int64_t n) {
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == n && same_device(t, scores), kWho,
        "contiguous float32 tensors of the scores' size on their device");
  return t.mutable_data_ptr<float>();
}

Tensor adam_topk(const Tensors& scores, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq,
                 const Tensors& steps, const Tensors& masks, const Ints& k, const OptTensor& hint, double lr,
                 double beta1, double beta2, double eps, double weight_decay, bool maximize, const Tensor& nan_flag) {
  TopkLayers made(kWho, scores, k, hint, masks);
  const OnDevice device(kWho, made.selection);
  check(grads.size() == scores.size() && exp_avg.size() == scores.size() && exp_avg_sq.size() == scores.size() &&
            steps.size() == scores.size(),
        kWho, "a gradient, two averages and a step for each score tensor");
  check(nan_flag.scalar_type() == ScalarType::Int && nan_flag.numel() == 1 && same_device(nan_flag, made.selection),
        kWho, "an int32 flag on the device of the scores");
  std::vector<cuda::AdamLayer> layers;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Tensor& s = scores[i];
    floats(s, s, s.numel());  // must be contiguous, because the layer points into the scores themselves
    layers.push_back({made.layers[i], floats(grads[i], s, s.numel()), floats(exp_avg[i], s, s.numel()),
                      floats(exp_avg_sq[i], s, s.numel()), floats(steps[i], s, 1)});
  }
  const auto bytes = static_cast<int64_t>(cuda::adam_topk_workspace_bytes(layers));
  Tensor workspace = torch::stable::new_empty(scores[0], {bytes}, ScalarType::Byte);
  device.launched(cuda::adam_topk(layers, {lr, beta1, beta2, eps, weight_decay, maximize},
                                  nan_flag.mutable_data_ptr<int32_t>(), workspace.mutable_data_ptr(),
                                  device.processors(), device.stream()));
  made.return_hint();
  return made.selection;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(exssnet_cuda, m) {
  m.def("adam_topk(Tensor(a!)[] scores, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
        "Tensor(d!)[] steps, Tensor(e!)[] masks, int[] k, Tensor(f!)? hint, float lr, float beta1, float beta2, "
        "float eps, float weight_decay, bool maximize, Tensor(g!) nan_flag) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(exssnet_cuda, CUDA, m) { m.impl("adam_topk", TORCH_BOX(&adam_topk)); }

}  // namespace exssnet
