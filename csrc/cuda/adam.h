// A step of Adam on the scores of many layers, fused with the next selection's pass over them.
//
// The new scores are compared with the bracket while they are in registers, so the selection reads none of them again:
// of n entries a step moves 28 n bytes (reads scores, gradient and both averages, writes all but the gradient) and the
// mask n more, where a step and a selection after it move 33 n. Launches: those of topk_masks and one for every 64
// layers. What topk_masks reads once more where a bracket missed, it reads here too.
// Without a usable hint the bracket is that of a sample of the scores before the step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/topk.h"

namespace exssnet::cuda {

struct AdamLayer {
  TopkLayer topk;     // of the scores after the step; dtype float32; their memory is written to
  const float* grad;  // n, like the averages
  float *exp_avg, *exp_avg_sq;
  float* step;        // 1: number of the steps before this one; incremented, as torch.optim does with capturable=True
};

// As those of torch.optim.Adam, which adds weight_decay * scores to the gradient.
struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// Of scratch memory, aligned to 16 bytes; the first bytes are those of topk_masks.
size_t adam_topk_workspace_bytes(const std::vector<AdamLayer>& layers);

// Arithmetic is in float32. The rest is as in topk_masks; with a NaN among the new scores, only they mean something.
cudaError_t adam_topk(const std::vector<AdamLayer>& layers, const Adam& adam, int32_t* nan_flag, void* workspace,
                      int processors, cudaStream_t stream);

}  // namespace exssnet::cuda
