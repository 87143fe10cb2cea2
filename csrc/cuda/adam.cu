#include "cuda/adam.h"

#include <algorithm>
#include <cmath>

#include "cuda/topk_settle.h"

namespace exssnet::cuda {

namespace {

constexpr int kAdamTable = 29;  // number of layers that fit into the parameters of a kernel

// A layer, as passed from the host.
struct AdamEntry {
  float* scores;
  const float* grad;
  float *exp_avg, *exp_avg_sq, *step;
};
struct AdamTable {
  Entry topk[kAdamTable];
  AdamEntry entries[kAdamTable];
};

// A layer, as stored in the workspace.
struct AdamWork {
  AdamEntry layer;
  float step_size;   // lr / (1 - beta1^step)
  float correction;  // sqrt(1 - beta2^step)
  bool aligned;      // whether the memory is aligned to vectors
};
static_assert(sizeof(AdamTable) + sizeof(Adam) + sizeof(Workspace) + 16 <= 4096);

// Begins the selection, increments the step and writes the values that depend on it. One block per layer of the table.
__global__ void __launch_bounds__(kThreads)
    begin_step(const __grid_constant__ AdamTable table, const Adam adam, AdamWork* works, Workspace space, int first) {
  __shared__ Shared<int32_t> shared;
  const int number = first + static_cast<int>(blockIdx.x);
  begin_layer(table.topk[blockIdx.x], space, number, shared);
  if (threadIdx.x != 0) return;
  const AdamEntry& layer = table.entries[blockIdx.x];
  const float step = *layer.step + 1;
  *layer.step = step;
  AdamWork& w = works[number];
  w.layer = layer;
  w.step_size = static_cast<float>(adam.lr / (1 - pow(adam.beta1, static_cast<double>(step))));
  w.correction = static_cast<float>(sqrt(1 - pow(adam.beta2, static_cast<double>(step))));
  w.aligned = (reinterpret_cast<uintptr_t>(layer.grad) | reinterpret_cast<uintptr_t>(layer.exp_avg) |
               reinterpret_cast<uintptr_t>(layer.exp_avg_sq)) % 16 == 0;
}

// Source of the pass over the scores: the new scores that Adam computes.
struct Updated {
  const AdamWork* works;
  float rest1, beta2, rest2, eps, weight_decay;  // rest: 1 - beta
  bool maximize;

  __device__ void update(const AdamWork& w, float& score, float grad, float& exp_avg, float& exp_avg_sq) const {
    if (maximize) grad = -grad;
    if (weight_decay != 0) grad += weight_decay * score;
    exp_avg += rest1 * (grad - exp_avg);
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad;
    score -= w.step_size * exp_avg / (sqrtf(exp_avg_sq) / w.correction + eps);
  }

  __device__ void operator()(const Work& topk, int number, int64_t i, bool whole, int32_t (&magnitudes)[4]) const {
    const AdamWork& w = works[number];
    const AdamEntry& to = w.layer;
    if (whole && w.aligned) {
      float4& scores = *reinterpret_cast<float4*>(to.scores + i);
      float4& exp_avg = *reinterpret_cast<float4*>(to.exp_avg + i);
      float4& exp_avg_sq = *reinterpret_cast<float4*>(to.exp_avg_sq + i);
      float4 s = scores, m = exp_avg, v = exp_avg_sq;
      const float4 g = *reinterpret_cast<const float4*>(to.grad + i);
      update(w, s.x, g.x, m.x, v.x);
      update(w, s.y, g.y, m.y, v.y);
      update(w, s.z, g.z, m.z, v.z);
      update(w, s.w, g.w, m.w, v.w);
      scores = s, exp_avg = m, exp_avg_sq = v;
      const float all[4] = {s.x, s.y, s.z, s.w};
      for (int j = 0; j < 4; ++j) magnitudes[j] = __float_as_int(all[j]) & kMagnitude<int32_t>;
    } else {
      for (int j = 0; j < 4; ++j) {
        magnitudes[j] = -1;
        if (i + j >= topk.layer.n) continue;
        update(w, to.scores[i + j], to.grad[i + j], to.exp_avg[i + j], to.exp_avg_sq[i + j]);
        magnitudes[j] = __float_as_int(to.scores[i + j]) & kMagnitude<int32_t>;
      }
    }
  }
};

__global__ void __launch_bounds__(kThreads, 2) update_and_scan(Workspace space, Updated updated) {
  scan_layers<int32_t>(space, updated);
}

std::vector<TopkLayer> selected(const std::vector<AdamLayer>& layers) {
  std::vector<TopkLayer> topk;
  for (const AdamLayer& layer : layers) topk.push_back(layer.topk);
  return topk;
}

size_t after_topk(const std::vector<TopkLayer>& layers) { return (topk_workspace_bytes(layers) + 15) / 16 * 16; }

}  // namespace

size_t adam_topk_workspace_bytes(const std::vector<AdamLayer>& layers) {
  return after_topk(selected(layers)) + layers.size() * sizeof(AdamWork);
}

cudaError_t adam_topk(const std::vector<AdamLayer>& layers, const Adam& adam, int32_t* nan_flag, void* workspace,
                      int processors, cudaStream_t stream) {
  if (layers.empty()) return cudaSuccess;
  const std::vector<TopkLayer> topk = selected(layers);
  auto* const works = reinterpret_cast<AdamWork*>(static_cast<char*>(workspace) + after_topk(topk));
  const Plan plan = topk_plan(topk, nan_flag, workspace);
  const Workspace& space = plan.space;
  for (int first = 0; first < space.layers; first += kAdamTable) {
    AdamTable table{};
    const int count = std::min(kAdamTable, space.layers - first);
    for (int i = 0; i < count; ++i) {
      const AdamLayer& layer = layers[first + i];
      auto* const scores = static_cast<float*>(const_cast<void*>(layer.topk.scores));
      table.topk[i] = plan.entries[first + i];
      table.entries[i] = {scores, layer.grad, layer.exp_avg, layer.exp_avg_sq, layer.step};
    }
    EXSSNET_TRY(EXSSNET_LAUNCH(begin_step, count, kThreads, 0, stream, table, adam, works, space, first));
  }
  const Updated updated{works,
                        static_cast<float>(1 - adam.beta1),
                        static_cast<float>(adam.beta2),
                        static_cast<float>(1 - adam.beta2),
                        static_cast<float>(adam.eps),
                        static_cast<float>(adam.weight_decay),
                        adam.maximize};
  EXSSNET_TRY(EXSSNET_LAUNCH(update_and_scan, pass_blocks(space, processors), kThreads, 0, stream, space, updated));
  return topk_rescue(space, Float::float32, processors, stream);
}

}  // namespace exssnet::cuda
