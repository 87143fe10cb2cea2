// Masks as bits: bit j of byte i is flat entry 8 i + j.
#pragma once

#include <cstdint>
#include <cstring>

namespace exssnet::cpu {

// Unpacks n entries, in one thread.
inline void unpack_bits(const uint8_t* __restrict packed, int64_t n, uint8_t* __restrict mask) {
  const auto spread = [](uint64_t byte) {
    const uint64_t picked = byte * 0x0101010101010101ull & 0x8040201008040201ull;  // byte j is zero or 1 << j
    return ((picked + 0x7f7f7f7f7f7f7f7full) | picked) >> 7 & 0x0101010101010101ull;
  };
  for (int64_t i = 0; i < n / 8; ++i) {
    const uint64_t eight = spread(packed[i]);
    std::memcpy(mask + 8 * i, &eight, 8);
  }
  if (n % 8 != 0) {
    const uint64_t rest = spread(packed[n / 8]);
    std::memcpy(mask + n / 8 * 8, &rest, n % 8);
  }
}

void pack_mask(const bool* mask, int64_t n, uint8_t* packed);
void unpack_mask(const uint8_t* packed, int64_t n, bool* mask);
void and_not(const uint8_t* mask, const uint8_t* used, int64_t bytes, uint8_t* free);

}  // namespace exssnet::cpu
