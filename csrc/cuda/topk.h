// Exact selection of the entries of largest magnitude on a GPU, for many layers at once: the twin of cpu/topk.h.
//
// One fixed sequence of launches, all decisions on the device: it may be captured in a graph. Scores are read once
// where the bracket (the hint's, or that of a sample of n^(2/3) scores) holds the k-th magnitude and not too many
// others, which is nearly always so: n entries of b bytes cost n (b + 1) bytes then, without a mask n b. Otherwise they
// are read once more for each narrowing that was needed, at most ceil(bits of a magnitude / 11), and once more for the
// mask. Where so many entries equal the threshold that they were only counted, the mask's bytes are passed over again.
// Launches: begin for every 40 layers, scan, settle, (histogram, narrow) for each of the 2, 3 or 6 possible narrowings
// of 16, 32 or 64 bits, scan, settle, paint: 12 for up to 40 layers of float32, of which begin, scan and settle have
// work to do in the usual case. Each dtype among the layers has its own sequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/floats.h"
#include "cuda/portable.h"

namespace exssnet::cuda {

using cpu::Float;

// As on the CPU, with pointers to memory of the device.
struct TopkLayer {
  const void* scores;  // n entries of dtype, aligned to them; 16-byte alignment, of the mask too, is faster
  Float dtype;
  int64_t n, k;        // 0 <= k <= n < 2^33
  uint8_t* mask;       // n bytes of 0 and 1 to write, or null
  const int64_t* hint; // what an earlier call wrote to new_hint, or anything: it changes speed only; or null
  int64_t* selection;  // 2: bits of the k-th largest magnitude, index of the last kept entry that has them
  int64_t* new_hint;   // 2: may be the hint's own memory
};

// Of scratch memory, aligned to 16 bytes; nothing in it needs to be set. About n / 2 bytes of a layer (float64: n).
// Afterwards its first 4 bytes are the number of layers, of the last dtype, whose scores were read more than once.
size_t topk_workspace_bytes(const std::vector<TopkLayer>& layers);

// Of equal magnitudes the smaller index is kept; NaN counts as more than infinity. Sets *nan_flag, which is on the
// device, to 1 where any score is NaN, and never clears it. `processors`: of the device, sizes the grids.
cudaError_t topk_masks(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace, int processors,
                       cudaStream_t stream);

}  // namespace exssnet::cuda
