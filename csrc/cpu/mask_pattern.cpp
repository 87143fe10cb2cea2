#include "cpu/mask_pattern.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {
constexpr int64_t kGrain = 1 << 15;  // weights per thread, at least

// Calls visit(at, kept, first, size) for blocks of the mask that cover [begin, end): entry at + i is kept if kept[i] is
// not zero, for i in [first, size).
template <class Visit>
void for_each_block(const Mask& mask, int64_t begin, int64_t end, const Visit& visit) {
  uint8_t block[kMaskBlock];
  for (int64_t at = begin / 8 * 8; at < end; at += kMaskBlock) {  // a packed mask is read in whole bytes
    const int64_t size = std::min(kMaskBlock, end - at);
    visit(at, mask_bytes(mask, at, size, block), std::max<int64_t>(begin - at, 0), size);
  }
}

// The count needs no branches, which would be mispredicted for every second kept entry.
int32_t count_kept(const Mask& mask, int64_t begin, int64_t end) {
  int32_t count = 0;
  for_each_block(mask, begin, end, [&](int64_t, const uint8_t* kept, int64_t first, int64_t size) {
    for (int64_t i = first; i < size; ++i) count += kept[i] != 0;
  });
  return count;
}

// Calls visit(entry) for the kept entries in [begin, end), in ascending order.
template <class Visit>
void for_each_kept(const Mask& mask, int64_t begin, int64_t end, const Visit& visit) {
  for_each_block(mask, begin, end, [&](int64_t at, const uint8_t* kept, int64_t i, int64_t size) {
    for (; i + 8 <= size; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, kept + i, 8);
      for (; eight != 0; eight &= eight - 1) visit(at + i + std::countr_zero(eight) / 8);
    }
    for (; i < size; ++i)
      if (kept[i]) visit(at + i);
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
