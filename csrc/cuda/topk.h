// Exact selection of the entries of largest magnitude on a GPU, for many layers at once: the twin of cpu/topk.h.
//
// One fixed sequence of launches, all decisions on the device: it may be captured in a graph. Scores are read once
// where the bracket (the hint's, or that of a sample of n^(2/3) scores) holds the k-th magnitude and not too many
// others, which is nearly always so: n entries of b bytes cost n (b + 1) bytes then, with a packed mask n (b + 1/8),
// without a mask n b. Otherwise they
// are read once more for each narrowing that was needed, at most ceil(bits of a magnitude / 11), and once more for the
// mask. Where so many entries equal the threshold that they were only counted, the mask's bytes, or for a packed mask
// the scores around these entries, are passed over again.
// Launches: begin for every 40 layers, scan, settle, (histogram, narrow) for each of the 2, 3 or 6 possible narrowings
// of 16, 32 or 64 bits, scan, settle, paint: 12 for up to 40 layers of float32, of which begin, scan and settle have
// work to do in the usual case. Each dtype among the layers has its own sequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/topk_layer.h"
#include "cuda/portable.h"

namespace exssnet::cuda {


// All pointers are to memory of the device. 16-byte alignment of scores and mask is faster; the new hint's memory may be
// the hint's own.

// Of scratch memory, aligned to 16 bytes; nothing in it needs to be set. About n / 2 bytes of a layer (float64: n).
// Afterwards its first 4 bytes are the number of layers, of the last dtype, whose scores were read more than once.
size_t topk_workspace_bytes(const std::vector<TopkLayer>& layers);

// Of equal magnitudes the smaller index is kept; NaN counts as more than infinity. Sets *nan_flag, which is on the
// device, to 1 where any score is NaN, and never clears it. `processors`: of the device, sizes the grids.
cudaError_t topk_masks(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace, int processors,
                       cudaStream_t stream);

}  // namespace exssnet::cuda
