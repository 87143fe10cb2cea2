// topk_masks, for the kernels of csrc/cpu/topk.
#include "cpu/bits.h"
#include "cpu/topk.h"
#include "torch/topk_layers.h"

namespace exssnet {
namespace {

std::tuple<std::vector<Tensor>, Tensor, Tensor> topk_masks(const std::vector<Tensor>& scores, const Ints& k,
                                                           const OptTensor& hint, bool with_masks, bool packed) {
  TopkLayers made(scores, k, hint, with_masks, false);
  check(made.selection.is_cpu(), "topk_masks", "scores on the CPU");
  const cpu::Place nan = cpu::topk_masks(made.layers);
  if (nan.layer >= 0)
    throw std::runtime_error("topk_masks: scores[" + std::to_string(nan.layer) + "] holds NaN, first at flat index " +
                             std::to_string(nan.index));
  if (packed)
    for (Tensor& mask : made.masks) {
      Tensor bits = torch::stable::new_empty(mask, {(mask.numel() + 7) / 8}, ScalarType::Byte);
      cpu::pack_mask(mask.const_data_ptr<bool>(), mask.numel(), bits.mutable_data_ptr<uint8_t>());
      mask = bits;
    }
  return {std::move(made.masks), made.selection, made.new_hint};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) { m.impl("topk_masks", TORCH_BOX(&topk_masks)); }

}  // namespace exssnet
