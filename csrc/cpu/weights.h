// Dense weights of all layers in one parallel pass: masked weights, free values, and the gradients of both.
#pragma once

#include <cstdint>
#include <vector>

#include "core/floats.h"
#include "cpu/epilogue.h"

namespace exssnet::cpu {

template <class Void>
struct FloatsOf {
  Void* data;  // null: not asked for
  Float type;
};
using ConstFloats = FloatsOf<const void>;
using Floats = FloatsOf<void>;

// How the dense side of a layer is stored. All other tensors of a weight (O, C, T) are contiguous.
struct Order {
  int64_t channels = 1, taps = 1;  // stored (O, T, C); with one tap: contiguous too
};

struct MaskedWeight {
  int64_t n;
  Order order;  // of `masked`
  ConstFloats weight;
  Mask mask;
  Floats masked;
};

struct MaskedGradient {
  int64_t n;
  Order order;       // of `grad`
  ConstFloats grad;  // of the masked weight
  ConstFloats weight, scores;
  Mask mask;
  Floats grad_scores, grad_weight;
};

struct PlacedValues {
  int64_t n;              // number of values
  const int32_t* places;  // of each value in the dense tensor
  int64_t size;           // entries of the dense tensor
  ConstFloats from;
  Floats to;
};

// masked = weight where the mask keeps it, else 0.
void masked_weights(const std::vector<MaskedWeight>& layers);

// grad_scores = grad * weight * sign(scores), computed in float32 or, if grad or weight is float64, in float64.
// grad_weight = grad where the mask keeps the weight, else 0.
void masked_gradients(const std::vector<MaskedGradient>& layers);

// to[places[i]] = from[i]. False if a place is outside the dense tensor; blocks with such a place are skipped.
bool write_values(const std::vector<PlacedValues>& layers);

// to[i] = from[places[i]]; otherwise as above.
bool gather_values(const std::vector<PlacedValues>& layers);

}  // namespace exssnet::cpu
