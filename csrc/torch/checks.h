// Shared by the entry points: checks for memory safety, and access to ATen. User errors are checked in exssnet/ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/floats.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.10 has a version without the error's message
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace exssnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Flags = std::vector<bool>;

// Throws a plain sentence. STD_TORCH_CHECK would add a file name.
inline void check(bool condition, const char* who, const char* expected) {
  if (!condition) throw std::runtime_error(std::string(who) + ": expected " + expected);
}

inline Float float_type(const Tensor& t, const char* who) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Float::float16;
    case ScalarType::BFloat16: return Float::bfloat16;
    case ScalarType::Float: return Float::float32;
    case ScalarType::Double: return Float::float64;
    default: throw std::runtime_error(std::string(who) + ": expected float32, float64, bfloat16 or float16");
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// Returns a contiguous tensor unchanged, without the cost of the dispatcher; else copies it.
inline Tensor row_major(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor like(const Tensor& shape, ScalarType dtype) {
  return torch::stable::new_empty(shape, shape.sizes(), dtype);
}

inline Tensor none_like(const Tensor& t) { return torch::stable::new_empty(t, {0}); }

// Calls an ATen operator that returns `kResults` tensors. The arguments are in the order of its schema.
template <size_t kResults = 1, class... Args>
auto aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(kResults, sizeof...(Args))> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  if constexpr (kResults == 1) {
    return torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    std::array<Tensor, kResults> results;
    for (size_t i = 0; i < kResults; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
    return results;
  }
}

}  // namespace exssnet
