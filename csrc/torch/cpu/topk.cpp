// topk_masks, for the kernels of csrc/cpu/topk.
#include <memory>

#include "cpu/bits.h"
#include "cpu/topk.h"
#include "torch/topk_layers.h"

namespace exssnet {
namespace {

Tensor topk_masks(const std::vector<Tensor>& scores, const Ints& k, const OptTensor& hint,
                  const std::vector<Tensor>& masks) {
  TopkLayers made("topk_masks", scores, k, hint, masks);
  check(made.selection.is_cpu(), "topk_masks", "scores on the CPU");
  std::vector<std::unique_ptr<bool[]>> unpacked;
  for (TopkLayer& layer : made.layers)
    if (layer.packed) {
      unpacked.emplace_back(new bool[layer.n]);
      layer.mask = reinterpret_cast<uint8_t*>(unpacked.back().get());
    }
  const cpu::Place nan = cpu::topk_masks(made.layers);
  if (nan.layer >= 0)
    throw std::runtime_error("topk_masks: scores[" + std::to_string(nan.layer) + "] holds NaN, first at flat index " +
                             std::to_string(nan.index));
  made.return_hint();
  for (size_t i = 0, next = 0; i < masks.size(); ++i)
    if (made.layers[i].packed)
      cpu::pack_mask(unpacked[next++].get(), made.layers[i].n, masks[i].mutable_data_ptr<uint8_t>());
  return made.selection;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) { m.impl("topk_masks", TORCH_BOX(&topk_masks)); }

}  // namespace exssnet
