// pack_mask, unpack_mask and free_mask, for the kernels of csrc/cpu/bits.
#include "cpu/bits.h"

#include "torch/checks.h"

namespace exssnet {
namespace {

Tensor pack_mask(const Tensor& mask) {
  check(mask.scalar_type() == ScalarType::Bool, "pack_mask", "a bool mask");
  const Tensor flat = torch::stable::contiguous(mask);
  Tensor packed = torch::stable::new_empty(mask, {(mask.numel() + 7) / 8}, ScalarType::Byte);
  cpu::pack_mask(flat.const_data_ptr<bool>(), mask.numel(), packed.mutable_data_ptr<uint8_t>());
  return packed;
}

Tensor unpack_mask(const Tensor& packed, const Ints& shape) {
  const Tensor bytes = torch::stable::contiguous(packed);
  Tensor mask = torch::stable::new_empty(packed, shape, ScalarType::Bool);
  check(packed.scalar_type() == ScalarType::Byte && packed.numel() == (mask.numel() + 7) / 8, "unpack_mask",
        "one byte for every 8 entries of the shape");
  cpu::unpack_mask(bytes.const_data_ptr<uint8_t>(), mask.numel(), mask.mutable_data_ptr<bool>());
  return mask;
}

Tensor free_mask(const Tensor& mask, const Tensor& used_mask) {
  // The same operation on bytes serves packed bits and bools of 0 and 1.
  check(mask.numel() == used_mask.numel() && mask.scalar_type() == used_mask.scalar_type() && mask.element_size() == 1,
        "free_mask", "two masks of one size and dtype");
  const Tensor a = torch::stable::contiguous(mask), b = torch::stable::contiguous(used_mask);
  Tensor free = torch::stable::empty_like(a);
  cpu::and_not(static_cast<const uint8_t*>(a.const_data_ptr()), static_cast<const uint8_t*>(b.const_data_ptr()),
               a.numel(), static_cast<uint8_t*>(free.mutable_data_ptr()));
  return free;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(exssnet, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("free_mask", TORCH_BOX(&free_mask));
}

}  // namespace exssnet
