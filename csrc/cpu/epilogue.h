// What surrounds a dense product under a mask: the effective weight before it, the gradients after it.
#pragma once

#include <cstdint>

#include "core/floats.h"

namespace exssnet::cpu {

// A mask over n weights: inline from a selection of scores, or as bytes, or as bits (see bits.h).
struct Mask {
  enum class Form { none, selection, bytes, bits } form = Form::none;
  const void* data = nullptr;  // scores, bytes or bits
  int score_bytes = 0;         // of one score, for a selection
  int64_t threshold = 0, tie_index = 0;
};

constexpr int64_t kMaskBlock = 1024;  // entries treated at a time, so that what is between two steps stays in the L1 cache

// The mask of at most kMaskBlock entries from `begin` on, a multiple of 8, as bytes of 0 and 1: in `kept`, or where they
// already are; null for no mask.
const uint8_t* mask_bytes(const Mask& mask, int64_t begin, int64_t n, uint8_t* kept);

// out[i] = in[i] where mask and free_mask (which may be none) keep, else 0; entries of 2, 4 or 8 bytes; out may be in.
void keep(const void* in, int entry_bytes, int64_t n, const Mask& mask, const Mask& free_mask, void* out);

// Straight-through gradient of the scores, grad * weight * sign(scores), computed in float32 or, for float64 weights,
// in float64. grad (n, of the weight's type) is that of the effective weight; out is of the scores' type. With
// keep_grad, grad becomes the weight's gradient in the same pass, 0 where the mask does not keep; without, out may be
// grad.
void score_gradient(void* grad, const void* weight, Float weight_type, const void* scores, Float score_type, int64_t n,
                    void* out, bool keep_grad, const Mask& mask);

}  // namespace exssnet::cpu
