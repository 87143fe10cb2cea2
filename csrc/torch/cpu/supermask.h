// Sparse products with the kept entries of a dense weight, for masks that keep few of them. The pattern is rebuilt in
// each call, which costs two passes over the mask.
#pragma once

#include "cpu/mask_pattern.h"
#include "torch/cpu/effective.h"
#include "torch/product.h"

namespace exssnet {

// The kept entries of a weight (O, C/groups, ...) as a sparse weight and, on request, its transpose.
struct KeptWeight {
  cpu::OwnedPattern pattern, transposed;
  SparseWeight weight;

  KeptWeight(const char* who, const Tensor& x, const Tensor& dense, const MaskOf& mask, int64_t groups, bool transpose)
      : weight{who, compute_dtype(x), compute_dtype(x), {}, {}, {}, {}} {
    const int64_t rows = dense.size(0);
    int64_t taps = 1;
    for (int64_t d = 2; d < dense.dim(); ++d) taps *= dense.size(d);
    const int64_t width = dense.size(1) * taps;
    check(groups > 0 && rows % groups == 0 && dense.numel() < kMost && width * groups < kMost, who,
          "a weight of fewer than 2^31 entries whose rows are divided by the groups");
    pattern = cpu::mask_pattern(mask.mask, rows, width, groups);
    if (transpose) transposed = cpu::transposed_pattern(pattern, taps);
    weight.pattern = pattern.view();
    weight.transposed = transposed.view();
    weight.free = row_major(to_dtype(dense, weight.dtype));
    weight.frozen = torch::stable::new_empty(weight.free, {0});
  }
};

}  // namespace exssnet
