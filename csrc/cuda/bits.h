// Packed masks on the GPU: bit j of byte i is flat entry 8 i + j. Unused bits of the last byte are zero.
//
// Each function is one launch, reads and writes every byte once, and is bound by memory bandwidth. Packing and
// unpacking n entries move 9 n / 8 bytes; and_not moves 3 bytes per byte of the mask. A thread moves 16 bytes at a time
// if the pointers are aligned to 16 bytes, else one byte. Empty masks launch nothing.
#pragma once

#include <cstdint>

#include "cuda/portable.h"

namespace exssnet::cuda {

// mask: n bytes of 0 or 1; packed: (n + 7) / 8 bytes.
cudaError_t pack_mask(const bool* mask, int64_t n, uint8_t* packed, cudaStream_t stream);
cudaError_t unpack_mask(const uint8_t* packed, int64_t n, bool* mask, cudaStream_t stream);
// free = mask & ~used, on packed bytes or on bytes of 0 and 1.
cudaError_t and_not(const uint8_t* mask, const uint8_t* used, int64_t bytes, uint8_t* free, cudaStream_t stream);

}  // namespace exssnet::cuda
