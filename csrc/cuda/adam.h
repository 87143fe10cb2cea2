// A step of Adam on the scores of many layers, fused with the selection's pass over the new scores.
//
// The new scores are compared with the bracket while they are in registers, so that the selection does not read them
// again. For n entries a step moves 28 n bytes (it reads scores, gradient and both averages, and writes all of them but
// the gradient) and the mask n bytes. A separate step and selection move 33 n bytes. Launches: those of topk_masks, the
// first for every 29 layers. If a bracket misses, scores are read again as in topk_masks. Without a usable hint, the
// bracket comes from a sample of the scores before the step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/topk.h"

namespace exssnet::cuda {

struct AdamLayer {
  TopkLayer topk;     // the scores, of dtype float32, which are updated in place
  const float* grad;  // n entries, like the averages
  float *exp_avg, *exp_avg_sq;
  float* step;        // 1 entry: number of previous steps; incremented, as with capturable=True in torch.optim
};

// Options, as in torch.optim.Adam: weight_decay * scores is added to the gradient.
struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// Size of the scratch memory, which must be aligned to 16 bytes. It begins with the scratch memory of topk_masks.
size_t adam_topk_workspace_bytes(const std::vector<AdamLayer>& layers);

// Arithmetic is in float32. The rest is as in topk_masks. If a new score is NaN, only the new scores are valid.
cudaError_t adam_topk(const std::vector<AdamLayer>& layers, const Adam& adam, int32_t* nan_flag, void* workspace,
                      int processors, cudaStream_t stream);

}  // namespace exssnet::cuda
