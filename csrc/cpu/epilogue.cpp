#include "cpu/epilogue.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/bits.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {

constexpr int64_t kBlock = kMaskBlock;
constexpr int64_t kGrain = 32;    // blocks per thread, at least
constexpr int64_t kNothing = std::numeric_limits<int64_t>::max();  // the threshold for k = 0

#define EXSSNET_BODY "cpu/epilogue_body.h"
#include "cpu/each_isa.h"

template <class B>
void at_least(const B* scores, int64_t n, int64_t threshold, uint8_t* kept) {
  if (threshold > std::numeric_limits<B>::max() || threshold == kNothing) std::memset(kept, 0, n);
  else EXSSNET_PICK(at_least<B>)(scores, n, static_cast<B>(std::max<int64_t>(threshold, 0)), kept);
}

template <class B>
void select(const Mask& mask, int64_t begin, int64_t n, uint8_t* kept) {
  const B* scores = static_cast<const B*>(mask.data) + begin;
  const int64_t with_ties = std::clamp<int64_t>(mask.tie_index - begin + 1, 0, n);  // entries up to the tie index
  const int64_t above = mask.threshold + (mask.threshold < kNothing);
  at_least(scores, with_ties, mask.threshold, kept);
  at_least(scores + with_ties, n - with_ties, above, kept + with_ties);
}

template <class U>
void where(const void* in, const uint8_t* kept, int64_t begin, int64_t n, void* out) {
  const U* from = static_cast<const U*>(in) + begin;
  U* to = static_cast<U*>(out) + begin;
  if (in != out) return EXSSNET_PICK(where<U>)(from, kept, n, to);
  U block[kBlock];
  EXSSNET_PICK(where<U>)(from, kept, n, block);
  std::memcpy(to, block, n * sizeof(U));
}

void keep_block(const void* in, int entry_bytes, int64_t begin, int64_t n, const Mask& mask, const Mask& free_mask,
                void* out) {
  uint8_t kept_here[kBlock], free_here[kBlock], both[kBlock];
  const uint8_t* kept = mask_bytes(mask, begin, n, kept_here);
  if (const uint8_t* free = mask_bytes(free_mask, begin, n, free_here)) {
    for (int64_t i = 0; i < n; ++i) both[i] = kept[i] & free[i];
    kept = both;
  }
  if (entry_bytes == 2) where<uint16_t>(in, kept, begin, n, out);
  else if (entry_bytes == 4) where<uint32_t>(in, kept, begin, n, out);
  else where<uint64_t>(in, kept, begin, n, out);
}

template <class Body>
void for_blocks(int64_t n, Body&& body) {
  parallel_for((n + kBlock - 1) / kBlock, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) body(b * kBlock, std::min(kBlock, n - b * kBlock));
  });
}

}  // namespace

const uint8_t* mask_bytes(const Mask& mask, int64_t begin, int64_t n, uint8_t* kept) {
  switch (mask.form) {
    case Mask::Form::none: return nullptr;
    case Mask::Form::bytes: return static_cast<const uint8_t*>(mask.data) + begin;
    case Mask::Form::bits: unpack_bits(static_cast<const uint8_t*>(mask.data) + begin / 8, n, kept); return kept;
    case Mask::Form::selection: break;
  }
  if (mask.score_bytes == 2) select<int16_t>(mask, begin, n, kept);
  else if (mask.score_bytes == 4) select<int32_t>(mask, begin, n, kept);
  else select<int64_t>(mask, begin, n, kept);
  return kept;
}

void keep(const void* in, int entry_bytes, int64_t n, const Mask& mask, const Mask& free_mask, void* out) {
  for_blocks(n, [&](int64_t begin, int64_t size) { keep_block(in, entry_bytes, begin, size, mask, free_mask, out); });
}

}  // namespace exssnet::cpu
