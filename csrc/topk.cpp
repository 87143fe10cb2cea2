// topk_masks: PyTorch meets csrc/cpu/topk.
#include "topk_layers.h"

namespace exssnet {
namespace {

std::tuple<std::vector<Tensor>, Tensor, Tensor> topk_masks(const std::vector<Tensor>& scores, const Ints& k,
                                                           const OptTensor& hint, bool with_masks) {
  TopkLayers made(scores, k, hint, with_masks);
  check(made.selection.is_cpu(), "topk_masks", "scores on the CPU");
  const cpu::Place nan = cpu::topk_masks(made.layers);
  if (nan.layer >= 0)
    throw std::runtime_error("topk_masks: scores[" + std::to_string(nan.layer) + "] holds NaN, first at flat index " +
                             std::to_string(nan.index));
  return {std::move(made.masks), made.selection, made.new_hint};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) { m.impl("topk_masks", TORCH_BOX(&topk_masks)); }

}  // namespace exssnet
