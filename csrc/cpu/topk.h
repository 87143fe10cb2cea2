// Exact selection of the entries of largest magnitude, for many layers at once.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/floats.h"

namespace exssnet::cpu {

struct TopkLayer {
  const void* scores;  // n entries of dtype
  Float dtype;
  int64_t n, k;        // 0 <= k <= n < 2^33
  uint8_t* mask;       // n bytes of 0 and 1 to write, or null
  const int64_t* hint; // what an earlier call wrote to new_hint, or anything: it changes speed only; or null
  int64_t* selection;  // 2: bits of the k-th largest magnitude, index of the last kept entry that has them
  int64_t* new_hint;   // 2
  bool packed = false; // the mask is bits, as of pack_mask, in memory aligned to 4 bytes: on a GPU alone
};

struct Place {
  int64_t layer, index;
};

// Of equal magnitudes the smaller index is kept. Returns the first NaN; there is none when its layer is -1. With a NaN
// anywhere, what was written means nothing.
Place topk_masks(const std::vector<TopkLayer>& layers);

}  // namespace exssnet::cpu
