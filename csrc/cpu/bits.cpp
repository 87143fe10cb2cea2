#include "cpu/bits.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {
constexpr int64_t kGrain = 1 << 14;                   // bytes of packed mask a thread takes at least
constexpr uint64_t kGather = 0x0102040810204080ull;   // moves the low bits of 8 bytes into the top byte
constexpr uint64_t kSpread = 0x8040201008040201ull;   // picks bit j in byte j
constexpr uint64_t kLowBits = 0x0101010101010101ull;
}  // namespace

void pack_mask(const bool* mask, int64_t n, uint8_t* packed) {
  parallel_for((n + 7) / 8, kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint64_t eight = 0;
      std::memcpy(&eight, mask + 8 * i, std::min<int64_t>(8, n - 8 * i));
      packed[i] = static_cast<uint8_t>((eight * kGather) >> 56);
    }
  });
}

void unpack_mask(const uint8_t* packed, int64_t n, bool* mask) {
  parallel_for((n + 7) / 8, kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t picked = packed[i] * kLowBits & kSpread;             // byte j is zero or 1 << j
      const uint64_t eight = ((picked + 0x7f7f7f7f7f7f7f7full) | picked) >> 7 & kLowBits;
      std::memcpy(mask + 8 * i, &eight, std::min<int64_t>(8, n - 8 * i));
    }
  });
}

void and_not(const uint8_t* mask, const uint8_t* used, int64_t bytes, uint8_t* free) {
  parallel_for(bytes, 8 * kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) free[i] = mask[i] & ~used[i];
  });
}

}  // namespace exssnet::cpu
