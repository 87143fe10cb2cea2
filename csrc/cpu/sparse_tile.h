// How a product is cut into tiles, and a pattern laid out for them.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/sparse.h"

namespace exssnet::cpu {

// A product as tiles see it: rows of results at positions of `out`, each the sum over channels and taps of `in`.
// Row r is channel r / phases() and phase r % phases() of the result.
struct Product {
  struct Tap {
    int64_t phase;  // of the result
    int64_t in_phase_h, shift_h, in_phase_w, shift_w;
  };
  int64_t batch, rows, channels;
  Axis in_h, in_w, out_h, out_w;
  std::vector<Tap> taps;

  int64_t phases() const { return out_h.phases * out_w.phases; }
  int64_t reach_h() const { return in_h.length - out_h.length; }
  int64_t reach_w() const { return in_w.length - out_w.length; }
  int64_t in_plane() const { return in_h.size * in_w.size * batch; }
  int64_t out_plane() const { return out_h.size * out_w.size * batch; }
};

// A pointwise convolution sees no neighbours: its image is one line, pixels and batch alike.
inline Convolution flattened(Convolution c) {
  if (!c.h.is_pointwise() || !c.w.is_pointwise()) return c;
  c.w.in = c.w.out = c.h.in * c.w.in * c.batch;
  c.h.in = c.h.out = c.batch = 1;
  return c;
}

inline Product forward_product(const Convolution& c) {
  Product p{c.batch, c.out_channels, c.in_channels, c.h.input(), c.w.input(), c.h.output(), c.w.output(), {}};
  for (int64_t r = 0; r < c.h.taps; ++r)
    for (int64_t s = 0; s < c.w.taps; ++s)
      p.taps.push_back({0, c.h.phase(r), c.h.shift(r), c.w.phase(s), c.w.shift(s)});
  return p;
}

inline Product input_gradient_product(const Convolution& c) {
  Product p{c.batch,
            c.in_channels * c.h.phases() * c.w.phases(),
            c.out_channels,
            c.h.output_gradient(),
            c.w.output_gradient(),
            c.h.input_gradient(),
            c.w.input_gradient(),
            {}};
  for (int64_t r = 0; r < c.h.taps; ++r)
    for (int64_t s = 0; s < c.w.taps; ++s)
      p.taps.push_back({c.h.phase(r) * c.w.phases() + c.w.phase(s), 0, c.h.reach() - c.h.shift(r), 0,
                        c.w.reach() - c.w.shift(s)});
  return p;
}

// Lines of an image, or vectors of a line: `count` from `first` on. The last span may reach past the end.
struct Span {
  int64_t first, count;
};

inline int64_t power_above(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

inline std::vector<Span> spans(int64_t total, int64_t most) {
  std::vector<Span> found;
  for (int64_t at = 0; at < total; at += most) found.push_back({at, std::min(most, power_above(total - at))});
  return found;
}

// A vector holds one pixel of `lanes` images; or, where the batch would leave vectors too empty, what stands next to
// each other in a line of pixels and images.
struct Tiling {
  int64_t lanes;
  bool by_pixel;
  int64_t images, groups;  // images side by side in a line of a tile, and how many such groups the batch has
  int64_t lines, vectors;  // of the largest tile
  std::vector<Span> down, across;

  Tiling(const Product& p, int64_t lanes, int64_t registers)
      : lanes(lanes), by_pixel(p.batch % lanes == 0 || p.batch > 4 * lanes) {
    images = by_pixel ? lanes : p.batch;
    groups = by_pixel ? (p.batch + lanes - 1) / lanes : 1;
    const int64_t width = (p.out_w.length * images + lanes - 1) / lanes;
    lines = std::min(power_above(p.out_h.length), registers >= 16 ? int64_t(4) : int64_t(2));
    vectors = std::min(power_above(width), registers / lines);
    down = spans(p.out_h.length, lines);
    across = spans(width, vectors);
  }
  int64_t size() const { return lines * vectors * lanes; }
  // Whether all vectors of a tile of the result are full of its pixels.
  bool is_whole(const Product& p, Span d, Span a) const {
    return d.first + d.count <= p.out_h.length &&
           (by_pixel ? p.batch % lanes == 0 && a.first + a.count <= p.out_w.length
                     : (a.first + a.count) * lanes <= p.out_w.length * p.batch);
  }
  int64_t tiles() const { return static_cast<int64_t>(down.size() * across.size()); }
};

// Where a block of channels lies in a patch: (channel, phase of h, line, phase of w, element of the line).
struct PatchLayout {
  int64_t height, line, pitch, channel;  // height: lines of a phase; the others are distances in elements

  PatchLayout(const Product& p, const Tiling& t)
      : height(t.lines + p.reach_h()), line(t.vectors * t.lanes + p.reach_w() * t.images), pitch(p.in_w.phases * line),
        channel(p.in_h.phases * height * pitch) {}
  int64_t offset(const Product::Tap& tap, int64_t images) const {
    return (tap.in_phase_h * height + tap.shift_h) * pitch + tap.in_phase_w * line + tap.shift_w * images;
  }
};

// The channels of a product in blocks: small enough for a patch to stay in the first-level cache while all rows pass
// over it, and so large that a row finds enough entries in a block to pay for loading and storing its sums.
struct Blocks {
  static constexpr int64_t kPatchBytes = 64 << 10, kMostPatchBytes = 256 << 10, kEntries = 6;
  int64_t channels, count;

  Blocks(const Product& p, int64_t entries, int64_t channel_bytes) {
    const int64_t by_cache = p.channels * channel_bytes / kPatchBytes + 1;
    const int64_t by_entries = entries / std::max<int64_t>(1, p.rows * kEntries) + 1;
    const int64_t wanted = std::max(std::min(by_cache, by_entries), p.channels * channel_bytes / kMostPatchBytes + 1);
    channels = std::max<int64_t>(1, (p.channels + wanted - 1) / wanted);
    count = (p.channels + channels - 1) / channels;
  }
};

// How many of `groups` groups of images to work on at a time, where the cache holds `most`: even shares, for longer runs
// of what is read.
inline int64_t groups_together(int64_t groups, int64_t most) {
  const int64_t shares = (groups + std::max<int64_t>(most, 1) - 1) / std::max<int64_t>(most, 1);
  return (groups + shares - 1) / shares;
}

// The entries of a pattern in the order in which tiles meet them.
template <class T>
struct Walk {
  int64_t rows = 0, blocks = 1;
  std::unique_ptr<int32_t[]> start;   // (rows, blocks + 1): where the entries of a row's blocks begin and end
  std::unique_ptr<int32_t[]> offset;  // of each entry in the patch
  std::unique_ptr<T[]> value;         // of each entry
  std::unique_ptr<int32_t[]> slot;    // of each entry, where only those of free values are walked

  const int32_t* row(int64_t r) const { return start.get() + r * (blocks + 1); }
};

// False if the pattern has a pointer, index or slot out of range. With only_free, entries of frozen values are left
// out, and the values too.
template <bool only_free, class T>
bool make_walk(const Product& p, const PatchLayout& layout, int64_t images, const Blocks& blocks,
               const Pattern& pattern, const Values<T>& values, Walk<T>& walk) {
  constexpr int64_t kGrain = 1 << 14;  // entries that are worth a thread
  const int64_t taps = p.taps.size(), phases = p.phases(), lines = p.rows / phases;
  if (pattern.rows != lines || pattern.columns != p.channels * taps || pattern.ptr[0] != 0 ||
      pattern.ptr[lines] != pattern.entries)
    return false;
  for (int64_t line = 0; line < lines; ++line)
    if (pattern.ptr[line] > pattern.ptr[line + 1]) return false;

  walk.rows = p.rows;
  walk.blocks = blocks.count;
  walk.start.reset(new int32_t[p.rows * (blocks.count + 1)]);
  walk.offset.reset(new int32_t[pattern.entries]);
  if (only_free) walk.slot.reset(new int32_t[pattern.entries]);
  else walk.value.reset(new T[pattern.entries]);
  std::vector<int32_t> place(pattern.columns), block_end(blocks.count);
  for (int64_t channel = 0; channel < p.channels; ++channel)
    for (int64_t tap = 0; tap < taps; ++tap)
      place[channel * taps + tap] =
          static_cast<int32_t>(channel % blocks.channels * layout.channel + layout.offset(p.taps[tap], images));
  for (int64_t block = 0; block < blocks.count; ++block)
    block_end[block] = static_cast<int32_t>(std::min((block + 1) * blocks.channels * taps, pattern.columns));

  const uint32_t columns = pattern.columns, slots = values.count;
  const auto value_of = [&](int32_t slot) {
    return *(slot < values.free_count ? values.free + slot : values.frozen + (slot - values.free_count));
  };
  std::atomic<bool> good = true;
  parallel_for(lines, kGrain * lines / std::max<int64_t>(1, pattern.entries) + 1, [&](int64_t begin, int64_t end) {
    uint32_t bad = 0;
    for (int32_t k = pattern.ptr[begin]; k < pattern.ptr[end]; ++k)
      bad |= (static_cast<uint32_t>(pattern.index[k]) >= columns) | (static_cast<uint32_t>(pattern.slot[k]) >= slots);
    if (bad != 0) {
      good = false;
      return;
    }
    for (int64_t line = begin; line < end; ++line) {
      const int32_t *index = pattern.index, *slot = pattern.slot;
      int32_t at = pattern.ptr[line];
      const int32_t last = pattern.ptr[line + 1];
      if (phases == 1 && !only_free) {  // all entries, in their order
        int32_t* start = walk.start.get() + line * (blocks.count + 1);
        for (int64_t block = 0; block < blocks.count; ++block)
          start[block + 1] = std::lower_bound(index + (block ? start[block] : at), index + last, block_end[block]) - index;
        start[0] = at;
        for (; at < last; ++at) walk.offset[at] = place[index[at]];
        if constexpr (!only_free)
          for (at = pattern.ptr[line]; at < last; ++at) walk.value[at] = value_of(slot[at]);
        continue;
      }
      for (int64_t phase = 0; phase < phases; ++phase) {
        int32_t* start = walk.start.get() + (line * phases + phase) * (blocks.count + 1);
        int64_t block = 0;
        start[0] = at;
        for (int32_t k = pattern.ptr[line]; k < last; ++k) {
          if (phases > 1 && p.taps[index[k] % taps].phase != phase) continue;
          if (only_free && slot[k] >= values.free_count) continue;
          while (index[k] >= block_end[block]) start[++block] = at;
          walk.offset[at] = place[index[k]];
          if constexpr (only_free) walk.slot[at] = slot[k];
          else walk.value[at] = value_of(slot[k]);
          ++at;
        }
        while (block < blocks.count) start[++block] = at;
      }
    }
  });
  return good;
}

// First rows of `parts` shares of about equally many entries.
template <class T>
std::vector<int64_t> share_rows(const Walk<T>& walk, int64_t parts) {
  std::vector<int64_t> first(parts + 1, walk.rows);
  const auto cost = [&](int64_t row) { return walk.row(row)[0] + row; };  // a row costs as much as an entry
  const int64_t total = walk.rows ? walk.row(walk.rows - 1)[walk.blocks] + walk.rows : 0;
  int64_t row = 0;
  for (int64_t part = 0; part < parts; ++part) {
    while (row < walk.rows && cost(row) < total * part / parts) ++row;
    first[part] = row;
  }
  return first;
}

}  // namespace exssnet::cpu
