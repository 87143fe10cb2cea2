// Exact selection of the entries of largest magnitude on a GPU, for many layers at once, as in cpu/topk.h.
//
// The sequence of launches is fixed, and all decisions are taken on the device, so that a CUDA graph can capture it.
// The bracket comes from the hint, or from a sample of n^(2/3) scores. If it contains the k-th magnitude and not too
// many others, which is almost always the case, the scores are read once. Then n entries of b bytes cost n (b + 1)
// bytes; with a packed mask n (b + 1/8) bytes; without a mask n b bytes. If the bracket of a hint missed, a sample
// gives another one, and the scores are read once more. If that misses too, one block reads the layer alone: once for
// each narrowing, at most ceil(bits of a magnitude / 11) times, and once more. If very many entries equal the
// threshold, they are only counted, and the scores around them are read again for the mask.
//
// Launches: begin for every 40 layers, scan, rescue. These are 3 for up to 40 layers. In the usual case rescue has
// nothing to do. Each dtype among the layers has its own sequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/topk_layer.h"
#include "cuda/portable.h"

namespace exssnet::cuda {


// All pointers point to memory of the device. Scores and masks that are aligned to 16 bytes are processed faster.

// Size of the scratch memory, which must be aligned to 16 bytes and need not be initialized: about n / 2 bytes per
// layer (float64: n bytes). Afterwards its first 4 bytes are the number of layers of the last dtype whose scores were
// read more than once.
size_t topk_workspace_bytes(const std::vector<TopkLayer>& layers);

// Tie-breaking: of equal magnitudes the smaller index is kept. NaN is larger than infinity. If any score is NaN,
// *nan_flag, which is on the device, is set to 1; it is never cleared. processors: number of multiprocessors, which
// affects the grids.
cudaError_t topk_masks(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace, int processors,
                       cudaStream_t stream);

}  // namespace exssnet::cuda
