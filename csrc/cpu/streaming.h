// Stores past the caches. A result larger than a second-level cache will not be found there by who reads it; written
// past the caches, its lines need not be read first, and what the caches hold stays.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace exssnet::cpu {

constexpr int64_t kStreamAlignment = 64;  // in bytes: of the widest vector

// Whether a result of `bytes` is to be streamed: see Vector::stream. Who streams calls finish_streams() before other
// threads may read.
inline bool is_streamed(const void* result, int64_t bytes) {
  constexpr int64_t kCacheBytes = 1 << 20;
  return EXSSNET_X86 && bytes >= kCacheBytes && reinterpret_cast<uintptr_t>(result) % kStreamAlignment == 0;
}

inline void finish_streams() {
#if EXSSNET_X86
  __builtin_ia32_sfence();
#endif
}

}  // namespace exssnet::cpu
