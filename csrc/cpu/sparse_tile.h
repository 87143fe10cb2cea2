// How a product is cut into tiles, and a pattern laid out for them.
#pragma once

#include <algorithm>
#include <vector>

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
  Span down_of(int64_t tile) const { return down[tile / across.size()]; }
  Span across_of(int64_t tile) const { return across[tile % across.size()]; }
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

// Whether one tile of full vectors is the whole image of a pointwise product (see `flattened`), so that patches and
// results may be read and written where they lie: linear layers, unless the batch leaves vectors empty.
inline bool is_one_tile(const Product& p, const Tiling& t, const PatchLayout& layout) {
  const auto plain = [](const Axis& axis) { return axis.stride == 1 && axis.phases == 1 && axis.lead == 0; };
  return p.taps.size() == 1 && plain(p.in_h) && plain(p.in_w) && plain(p.out_h) && plain(p.out_w) &&
         t.tiles() * t.groups == 1 && p.in_plane() == layout.channel && p.out_plane() == layout.channel;
}

// The channels of a product in blocks: small enough for a patch to stay in a cache while all rows pass over it, and so
// large that a row finds enough entries in a block to pay for loading and storing its sums.
struct Blocks {
  static constexpr int64_t kPatchBytes = 64 << 10, kSmallBytes = 24 << 10, kMostPatchBytes = 256 << 10, kEntries = 6;
  int64_t channels, count;

  // cache_bytes: kPatchBytes; kSmallBytes where a patch is not copied and a row keeps no sums, so that blocks cost little.
  Blocks(const Product& p, int64_t entries, int64_t channel_bytes, int64_t cache_bytes) {
    const int64_t by_cache = p.channels * channel_bytes / cache_bytes + 1;
    const int64_t by_entries = entries / std::max<int64_t>(1, p.rows * kEntries) + 1;
    const int64_t wanted = std::max(std::min(by_cache, by_entries), p.channels * channel_bytes / kMostPatchBytes + 1);
    channels = std::max<int64_t>(1, (p.channels + wanted - 1) / wanted);
    count = std::max<int64_t>(1, (p.channels + channels - 1) / channels);
  }
};

// How many of `groups` groups of images to work on at a time, where the cache holds `most`: even shares, for longer runs
// of what is read.
inline int64_t groups_together(int64_t groups, int64_t most) {
  const int64_t shares = (groups + std::max<int64_t>(most, 1) - 1) / std::max<int64_t>(most, 1);
  return (groups + shares - 1) / shares;
}

// The entries of a pattern in the order in which tiles meet them. The memory is scratch of the calling thread.
template <class T>
struct Walk {
  int64_t rows, blocks;
  int32_t* start;   // (rows, blocks + 1): where the entries of a row's blocks begin and end
  int32_t* offset;  // of each entry in the patch
  T* value;         // of each entry; null where only those of free values are walked
  int32_t* slot;    // of each entry, where only those of free values are walked; or null

  const int32_t* row(int64_t r) const { return start + r * (blocks + 1); }
};

}  // namespace exssnet::cpu
