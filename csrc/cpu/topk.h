// Exact selection of the entries of largest magnitude, for many layers at once.
#pragma once

#include <vector>

#include "core/topk_layer.h"

namespace exssnet::cpu {

struct Place {
  int64_t layer, index;
};

// Of equal magnitudes the smaller index is kept. Returns the first NaN; there is none when its layer is -1. With a NaN
// anywhere, what was written means nothing.
Place topk_masks(const std::vector<TopkLayer>& layers);

}  // namespace exssnet::cpu
