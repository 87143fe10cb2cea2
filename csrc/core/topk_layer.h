// A layer to select from, as the CPU and CUDA kernels take it.
#pragma once

#include <cstdint>

#include "core/floats.h"

namespace exssnet {

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

}  // namespace exssnet
