#include "cpu/mask_pattern.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {
constexpr int64_t kGrain = 1 << 15;  // weights per thread, at least

constexpr uint64_t kOnes = 0x0101010101010101;  // the bits of 8 bytes of a mask that count, whatever else is in them

// Calls visit(entry, bits) for every 8 entries of [begin, end), or fewer. Bit 8 i of `bits` is that of entry + i.
template <class Visit>
void for_each_eight(const Mask& mask, int64_t begin, int64_t end, const Visit& visit) {
  uint8_t block[kMaskBlock];
  for (int64_t at = begin / 8 * 8; at < end; at += kMaskBlock) {  // a packed mask is read in whole bytes
    const int64_t size = std::min(kMaskBlock, end - at);
    const uint8_t* kept = mask_bytes(mask, at, size, block);
    int64_t i = std::max<int64_t>(begin - at, 0);
    for (; i + 8 <= size; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, kept + i, 8);
      visit(at + i, eight & kOnes);
    }
    for (; i < size; ++i) visit(at + i, kept[i] & kOnes);
  }
}

// Branches would be mispredicted for every second kept entry, so each sum of 8 bytes is the upper byte of a product.
int32_t count_kept(const Mask& mask, int64_t begin, int64_t end) {
  uint64_t count = 0;
  for_each_eight(mask, begin, end, [&](int64_t, uint64_t bits) { count += bits * kOnes >> 56; });
  return static_cast<int32_t>(count);
}

// Calls visit(entry) for the kept entries in [begin, end), in ascending order.
template <class Visit>
void for_each_kept(const Mask& mask, int64_t begin, int64_t end, const Visit& visit) {
  for_each_eight(mask, begin, end, [&](int64_t entry, uint64_t bits) {
    for (; bits != 0; bits &= bits - 1) visit(entry + std::countr_zero(bits) / 8);
  });
}
}  // namespace

OwnedPattern mask_pattern(const Mask& mask, int64_t rows, int64_t width, int64_t groups) {
  OwnedPattern p;
  p.columns = width * groups;
  p.ptr.assign(rows + 1, 0);
  const int64_t grain = kGrain / (width + 1) + 1;
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) p.ptr[row + 1] = count_kept(mask, row * width, (row + 1) * width);
  });
  std::partial_sum(p.ptr.begin(), p.ptr.end(), p.ptr.begin());
  p.index.resize(p.ptr.back());
  p.slot.resize(p.ptr.back());
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t at = p.ptr[row];
      const int64_t shift = row / (rows / groups) * width - row * width;
      for_each_kept(mask, row * width, (row + 1) * width, [&](int64_t entry) {
        p.index[at] = static_cast<int32_t>(entry + shift);
        p.slot[at++] = static_cast<int32_t>(entry);
      });
    }
  });
  return p;
}

OwnedPattern transposed_pattern(const OwnedPattern& pattern, int64_t taps) {
  const int64_t rows = pattern.ptr.size() - 1, channels = pattern.columns / taps, entries = pattern.index.size();
  OwnedPattern t;
  t.columns = rows * taps;
  t.ptr.assign(channels + 1, 0);
  t.index.resize(entries);
  t.slot.resize(entries);
  std::vector<int32_t> channel_of(pattern.columns);
  for (int64_t column = 0; column < pattern.columns; ++column) channel_of[column] = static_cast<int32_t>(column / taps);
  for (const int32_t column : pattern.index) ++t.ptr[channel_of[column] + 1];
  std::partial_sum(t.ptr.begin(), t.ptr.end(), t.ptr.begin());
  std::vector<int32_t> next(t.ptr.begin(), t.ptr.end() - 1);
  for (int64_t row = 0; row < rows; ++row)
    for (int32_t k = pattern.ptr[row]; k < pattern.ptr[row + 1]; ++k) {
      const int32_t channel = channel_of[pattern.index[k]], at = next[channel]++;
      t.index[at] = static_cast<int32_t>(row * taps + pattern.index[k] - channel * taps);
      t.slot[at] = pattern.slot[k];
    }
  return t;
}

}  // namespace exssnet::cpu
