#include "cpu/bits.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {
constexpr int64_t kGrain = 1 << 14;  // bytes of packed mask per thread, at least

// Plain functions with __restrict pointers, because byte pointers may alias everything, even the captures of a lambda.
uint8_t gather(uint64_t eight) { return static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56); }

void pack_bits(const bool* __restrict mask, int64_t bytes, uint8_t* __restrict packed) {
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t eight;
    std::memcpy(&eight, mask + 8 * i, 8);
    packed[i] = gather(eight);  // the low bits of 8 bytes
  }
}

void and_not_bytes(const uint8_t* __restrict mask, const uint8_t* __restrict used, int64_t n,
                   uint8_t* __restrict free) {
  for (int64_t i = 0; i < n; ++i) free[i] = mask[i] & ~used[i];
}
}  // namespace

void pack_mask(const bool* mask, int64_t n, uint8_t* packed) {
  parallel_for(n / 8, kGrain,
               [=](int64_t begin, int64_t end) { pack_bits(mask + 8 * begin, end - begin, packed + begin); });
  if (n % 8 != 0) {
    uint64_t rest = 0;
    std::memcpy(&rest, mask + n / 8 * 8, n % 8);
    packed[n / 8] = gather(rest);
  }
}

void unpack_mask(const uint8_t* packed, int64_t n, bool* mask) {
  parallel_for((n + 7) / 8, kGrain, [=](int64_t begin, int64_t end) {
    unpack_bits(packed + begin, std::min(8 * end, n) - 8 * begin, reinterpret_cast<uint8_t*>(mask) + 8 * begin);
  });
}

void and_not(const uint8_t* mask, const uint8_t* used, int64_t bytes, uint8_t* free) {
  parallel_for(bytes, 8 * kGrain, [=](int64_t begin, int64_t end) {
    and_not_bytes(mask + begin, used + begin, end - begin, free + begin);
  });
}

}  // namespace exssnet::cpu
