// A layer to select from, for the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "core/floats.h"

namespace exssnet {

struct TopkLayer {
  const void* scores;  // n entries of dtype
  Float dtype;
  int64_t n, k;        // 0 <= k <= n < 2^33
  uint8_t* mask;       // n bytes to write, 0 or 1, or null
  const int64_t* hint; // new_hint of an earlier call, or any values, or null; changes only the speed
  int64_t* selection;  // 2: bits of the k-th largest magnitude, index of the last kept entry with these bits
  int64_t* new_hint;   // 2
  bool packed = false; // the mask is packed (see pack_mask), in memory aligned to 4 bytes; on a GPU only
};

}  // namespace exssnet
