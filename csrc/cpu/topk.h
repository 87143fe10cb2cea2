// Exact selection of the entries of largest magnitude, for many layers at once.
#pragma once

#include <vector>

#include "core/topk_layer.h"

namespace exssnet::cpu {

struct Place {
  int64_t layer, index;
};

// Tie-breaking: of equal magnitudes the smaller index is kept. Returns the place of the first NaN; its layer is -1 if
// there is no NaN. With a NaN, the results are undefined.
Place topk_masks(const std::vector<TopkLayer>& layers);

}  // namespace exssnet::cpu
