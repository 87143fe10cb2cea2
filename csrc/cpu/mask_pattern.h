// The pattern of a dense weight under a mask, for products with what is kept while the mask changes at every step.
#pragma once

#include <vector>

#include "cpu/epilogue.h"
#include "cpu/sparse.h"

namespace exssnet::cpu {

// A pattern with its memory. Slots are flat indices into the dense weight.
struct OwnedPattern {
  std::vector<int32_t> ptr, index, slot;
  int64_t columns = 0;

  Pattern view() const {
    return {ptr.data(), index.data(), slot.data(), static_cast<int64_t>(ptr.size()) - 1, columns,
            static_cast<int64_t>(index.size())};
  }
};

// Of a weight (rows, width) with rows and columns in `groups` diagonal blocks: the pattern (rows, width * groups).
OwnedPattern mask_pattern(const Mask& mask, int64_t rows, int64_t width, int64_t groups);

// That of the transpose: (channels, rows * taps), where column c of the pattern is channel c / taps and tap c % taps.
OwnedPattern transposed_pattern(const OwnedPattern& pattern, int64_t taps);

}  // namespace exssnet::cpu
