// Builds the pattern of a dense weight and a mask, for sparse products while the mask changes at every step.
#pragma once

#include <vector>

#include "cpu/epilogue.h"
#include "cpu/sparse.h"

namespace exssnet::cpu {

// A pattern that owns its memory. Slots are flat indices into the dense weight.
struct OwnedPattern {
  std::vector<int32_t> ptr, index, slot;
  int64_t columns = 0;

  Pattern view() const {
    return {ptr.data(), index.data(), slot.data(), static_cast<int64_t>(ptr.size()) - 1, columns,
            static_cast<int64_t>(index.size())};
  }
};

// The pattern (rows, width * groups) of a weight (rows, width), which forms `groups` diagonal blocks.
OwnedPattern mask_pattern(const Mask& mask, int64_t rows, int64_t width, int64_t groups);

// The transposed pattern (channels, rows * taps). Column c of `pattern` is channel c / taps and tap c % taps.
OwnedPattern transposed_pattern(const OwnedPattern& pattern, int64_t taps);

}  // namespace exssnet::cpu
