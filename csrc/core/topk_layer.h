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
  int64_t* hint;       // 2, or null: what an earlier call left there, or any values; updated; changes only the speed
  int64_t* selection;  // 2: bits of the k-th largest magnitude, index of the last kept entry with these bits
  bool packed = false; // the mask is packed (see pack_mask), in memory aligned to 4 bytes; on a GPU only
};

}  // namespace exssnet
