// The steps before and after a dense product with a mask: the effective weight before it, the gradients after it.
#pragma once

#include <cstdint>

#include "core/floats.h"

namespace exssnet::cpu {

// A mask over n weights: bytes, bits (see bits.h), or a selection, from which it is computed on the fly.
struct Mask {
  enum class Form { none, selection, bytes, bits } form = Form::none;
  const void* data = nullptr;  // scores, bytes or bits
  int score_bytes = 0;         // size of one score, for a selection
  int64_t threshold = 0, tie_index = 0;
};

constexpr int64_t kMaskBlock = 1024;  // entries per block, so that results between two steps stay in L1

// The mask of at most kMaskBlock entries from `begin` on, as bytes of 0 and 1. `begin` is a multiple of 8. The result
// is in `kept` or, if the mask is bytes, in its own memory. Null if there is no mask.
const uint8_t* mask_bytes(const Mask& mask, int64_t begin, int64_t n, uint8_t* kept);

// out[i] = in[i] where mask and free_mask (may be none) keep, else 0. Entries have 2, 4 or 8 bytes; out may equal in.
void keep(const void* in, int entry_bytes, int64_t n, const Mask& mask, const Mask& free_mask, void* out);

}  // namespace exssnet::cpu
