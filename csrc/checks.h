// What the entry points share: memory safety checks and access to ATen. User errors live in exssnet/ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace exssnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// Throws the plain sentence: STD_TORCH_CHECK would put a file name before it.
inline void check(bool condition, const char* who, const char* expected) {
  if (!condition) throw std::runtime_error(std::string(who) + ": expected " + expected);
}

}  // namespace exssnet
