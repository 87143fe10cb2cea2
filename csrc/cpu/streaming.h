// Stores that bypass the caches. A result larger than the L2 cache is evicted before it is read again. A streaming
// store does not read the cache line first, and does not evict other data.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace exssnet::cpu {

constexpr int64_t kStreamAlignment = 64;  // in bytes: the size of the widest vector

// Whether a result of `bytes` should be streamed (see Vector::stream). After streaming, finish_streams() must be called
// before other threads read the result.
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
