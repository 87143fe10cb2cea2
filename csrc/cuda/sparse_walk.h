// How the sparse products of sparse.cu go through images: tiles of results, patches of sources, entries of rows.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/sparse.h"

namespace exssnet::cuda {

constexpr int kSparseWarps = 8;
constexpr int kSparseThreads = 32 * kSparseWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNone = std::numeric_limits<int>::max();

template <class T>
using Sum = std::conditional_t<sizeof(T) == 8, double, float>;
template <class T>
constexpr int kLanes = 16 / sizeof(T);  // elements of a vector
template <class T>
constexpr int kMostRows = sizeof(T) == 8 ? 2 : 4;  // of a warp
template <class T>
constexpr int kHeld = sizeof(T) == 2 ? 2 : 4;  // vectors of a row that a lane sums, as far as registers go

__host__ __device__ constexpr int64_t groups_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A kept weight as a warp meets it: where its source is, and its value or slot.
template <class What>
struct alignas(2 * sizeof(What)) Entry {
  int offset;
  What what;
};
constexpr int kWindow = 32;  // entries of a row that a warp has at hand
template <class T>
constexpr int kPatchBytes = (47 << 10) - kSparseWarps * kMostRows<T> * kWindow * int(sizeof(Entry<Sum<T>>));

// Height or width of a product, forward or transposed. Results go by phases: result `a + phases * i` of phase a reads,
// at tap t, source step * i + shift(a, t), if the tap is live in this phase. Forward, there is one phase.
struct Axis {
  int in, out;  // pixels of the source and of the result
  int taps, step, phases;
  int offset, slope;

  __device__ int moved(int a, int t) const { return offset + a + slope * t; }
  __device__ bool live(int a, int t) const { return phases == 1 || moved(a, t) % phases == 0; }
  __device__ int shift(int a, int t) const { return phases == 1 ? moved(a, t) : moved(a, t) / phases; }
  // No shift of a live tap is smaller: those are exact quotients, so that either way of rounding will do.
  __device__ int first(int a) const { return shift(a, slope < 0 ? taps - 1 : 0); }
  int64_t reach() const { return ((slope < 0 ? -slope : slope) * (taps - int64_t{1}) + phases - 1) / phases; }
  int64_t positions() const { return groups_of(out, phases); }  // of the first phase, the longest
};

// How a product is laid out. A unit is what a patch holds of: a channel, or the source of one column of the pattern.
struct Plan {
  Axis h, w;
  int64_t batch;
  int rows, columns, taps;
  int units, chunk;            // chunk: units in a patch
  bool by_columns;
  int vectors_shift;           // log2 of the vectors of images in a tile
  int tile_h, tile_w;          // positions in a tile
  int patch_h, patch_w;        // pixels of a unit in a patch
  int64_t tiles_h, tiles_w, tiles_n;

  __host__ __device__ int vectors() const { return 1 << vectors_shift; }
  __host__ __device__ int plane() const { return patch_h * patch_w << vectors_shift; }  // vectors of a unit
  int64_t tiles() const { return int64_t{h.phases} * w.phases * tiles_n * tiles_h * tiles_w; }
};

// A tile: its phases, the smallest shifts there, its first positions, its first image. It lies in shared memory, which
// saves registers.
struct Tile {
  int phase_h, phase_w, first_h, first_w, h, w;
  int64_t n;
};

// Sets the block's tile. All threads.
template <class T>
__device__ void enter(const Plan& plan, int64_t index, Tile& tile) {
  __syncthreads();  // all have left the last one
  if (threadIdx.x == 0) {
    const auto next = [&](int64_t count) {
      const int64_t at = index % count;
      index /= count;
      return at;
    };
    tile.w = static_cast<int>(next(plan.tiles_w)) * plan.tile_w;
    tile.h = static_cast<int>(next(plan.tiles_h)) * plan.tile_h;
    tile.n = (next(plan.tiles_n) << plan.vectors_shift) * kLanes<T>;
    tile.phase_w = static_cast<int>(next(plan.w.phases)), tile.phase_h = static_cast<int>(index);
    tile.first_h = plan.h.first(tile.phase_h), tile.first_w = plan.w.first(tile.phase_w);
  }
  __syncthreads();
}

template <class T>
__host__ __device__ bool in_vectors(const T* images, int64_t batch) {
  return batch % kLanes<T> == 0 && reinterpret_cast<uintptr_t>(images) % 16 == 0;
}

// The vector at `from`, of which `left` elements are there; zeros behind them.
template <class T>
__device__ uint4 load(const T* from, int64_t left, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint4*>(from);
  T elements[kLanes<T>];
  for (int j = 0; j < kLanes<T>; ++j) elements[j] = j < left ? from[j] : T(0.0f);
  uint4 vector;
  memcpy(&vector, elements, 16);
  return vector;
}

template <class T>
__device__ void spread(uint4 vector, Sum<T> (&elements)[kLanes<T>]) {
  T stored[kLanes<T>];
  memcpy(stored, &vector, 16);
  for (int j = 0; j < kLanes<T>; ++j) elements[j] = static_cast<Sum<T>>(stored[j]);
}

// Vector v of a tile that this lane works on: where it begins in a plane of the patch, and in a plane of the result
// (negative where the result has no such pixel or image).
struct Place {
  int in_patch;
  int64_t in_result, image;
};

template <class T>
__device__ Place place(const Plan& plan, const Tile& tile, int v) {
  const int index = v * 32 + static_cast<int>(threadIdx.x % 32), pixel = index >> plan.vectors_shift;
  const int i = pixel / plan.tile_w, j = pixel % plan.tile_w, n = index & (plan.vectors() - 1);
  if (i >= plan.tile_h) return {0, -1, 0};
  const int step_h = plan.by_columns ? 1 : plan.h.step, step_w = plan.by_columns ? 1 : plan.w.step;
  const int64_t h = tile.phase_h + int64_t{plan.h.phases} * (tile.h + i);
  const int64_t w = tile.phase_w + int64_t{plan.w.phases} * (tile.w + j);
  const int64_t image = tile.n + n * kLanes<T>;
  const bool there = h < plan.h.out && w < plan.w.out && image < plan.batch;
  return {((i * step_h * plan.patch_w + j * step_w) << plan.vectors_shift) + n,
          there ? (h * plan.w.out + w) * plan.batch + image : -1, image};
}

// Row and column of a tap, and the channel.
struct Column {
  int channel, r, s;

  __device__ Column(const Plan& plan, int column) {
    channel = column / plan.taps;
    const int tap = column - channel * plan.taps;
    r = tap / plan.w.taps, s = tap - r * plan.w.taps;
  }
};

// Copies what a tile reads of units [begin, end) of x, zeros where there are no pixels or images. All threads.
template <class T>
__device__ void stage(const Plan& plan, const Tile& tile, int begin, int end, const T* x, uint4* patch) {
  const int width = plan.patch_w << plan.vectors_shift, lines = (end - begin) * plan.patch_h;
  const bool aligned = in_vectors(x, plan.batch);
#pragma unroll 1
  for (int line = static_cast<int>(threadIdx.x / 32); line < lines; line += kSparseWarps) {
    const int unit = line / plan.patch_h, i = line - unit * plan.patch_h;
    int channel = begin + unit, h, w, step = 1;
    if (plan.by_columns) {
      const Column column(plan, channel);
      channel = column.channel, step = plan.w.step;
      h = (tile.h + i) * plan.h.step + plan.h.shift(tile.phase_h, column.r);
      w = tile.w * step + plan.w.shift(tile.phase_w, column.s);
    } else {
      h = tile.h * plan.h.step + tile.first_h + i;
      w = tile.w * plan.w.step + tile.first_w;
    }
    const bool inside = 0 <= h && h < plan.h.in;
    const T* const from = x + (int64_t{channel} * plan.h.in + h) * plan.w.in * plan.batch;
#pragma unroll 2
    for (int v = static_cast<int>(threadIdx.x % 32); v < width; v += 32) {
      const int pixel = w + (v >> plan.vectors_shift) * step;
      const int64_t image = tile.n + (v & (plan.vectors() - 1)) * kLanes<T>;
      const bool there = inside && 0 <= pixel && pixel < plan.w.in && image < plan.batch;
      uint4 vector = make_uint4(0, 0, 0, 0);
      if (there) vector = load(from + pixel * plan.batch + image, plan.batch - image, aligned);
      patch[line * width + v] = vector;
    }
  }
}

// The entries [begin, end) of a row; none where the pointers may not be followed.
struct Range {
  int begin, end;

  __device__ Range(const Pattern& pattern, int64_t row) {
    const auto entries = static_cast<int>(pattern.entries);
    begin = min(max(pattern.ptr[row], 0), entries), end = min(max(pattern.ptr[row + 1], begin), entries);
  }
};

// Deals the kRows * kSparseWarps rows of a group to the warps, long ones with short ones. All threads.
template <int kRows>
__device__ void deal(const Plan& plan, const Pattern& pattern, int64_t group, int* order) {
  static_assert(kRows * kSparseWarps <= 32);
  if (kRows == 1) return;
  if (threadIdx.x < 32) {
    const int64_t row = group * kRows * kSparseWarps + threadIdx.x;
    const bool is_row = threadIdx.x < kRows * kSparseWarps && row < plan.rows;
    int length = -1, rank = 0;
    if (is_row) {
      const Range entries(pattern, row);
      length = entries.end - entries.begin;
    }
    for (int other = 0; other < 32; ++other) {
      const int theirs = __shfl_sync(kAllLanes, length, other);
      rank += theirs > length || (theirs == length && other < static_cast<int>(threadIdx.x));
    }
    order[rank] = static_cast<int>(threadIdx.x);
  }
  __syncthreads();
}

// Row r of this warp, or plan.rows.
template <int kRows>
__device__ int row_of(const Plan& plan, int64_t group, const int* order, int r) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int dealt = r * kSparseWarps + (r % 2 == 0 ? warp : kSparseWarps - 1 - warp);
  return static_cast<int>(min(group * kRows * kSparseWarps + (kRows == 1 ? dealt : order[dealt]), int64_t{plan.rows}));
}

// Where a warp is in its rows. The entries at hand lie in windows, one for each row, in order, without those that are
// left out.
template <int kRows>
struct Cursors {
  int next, end;    // of the row that has the number of this lane
  int unit[kRows];  // of the entry that this lane has put into the window of each row, or kNone

  // At the first entries of the rows whose unit is not before `begin`.
  __device__ Cursors(const Plan& plan, const Pattern& pattern, int64_t group, const int* order, int begin)
      : next(0), end(0) {
    for (int r = 0; r < kRows; ++r) unit[r] = kNone;
    const int r = static_cast<int>(threadIdx.x % 32);
    const int row = r < kRows ? row_of<kRows>(plan, group, order, r) : plan.rows;
    if (row == plan.rows) return;
    const Range entries(pattern, row);
    next = entries.begin, end = entries.end;
    const int64_t column = int64_t{begin} * (plan.by_columns ? 1 : plan.taps);
    for (int last = end; column > 0 && next < last;) {
      const int middle = next + (last - next) / 2;
      if (pattern.index[middle] < column) next = middle + 1;
      else last = middle;
    }
  }
};

// The next entries of row r. what(slot, entry.what) tells whether an entry is wanted. Offsets are in vectors of the
// patch, or, where x is not staged, channels.
template <bool kStaged, int kRows, class E, class What>
__device__ void fill(const Plan& plan, const Pattern& pattern, const Tile& tile, Cursors<kRows>& cursors, int r,
                     E* window, const What& what) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int next = __shfl_sync(kAllLanes, cursors.next, r), left = __shfl_sync(kAllLanes, cursors.end, r) - next;
  E entry;
  int unit = kNone;
  if (lane < left) {
    const int index = pattern.index[next + lane];
    if (0 <= index && index < plan.columns && what(pattern.slot[next + lane], entry.what)) {
      if (kStaged) {
        const Column column(plan, index);
        if (plan.h.live(tile.phase_h, column.r) && plan.w.live(tile.phase_w, column.s)) {
          unit = plan.by_columns ? index : column.channel;
          const int shift_h = plan.h.shift(tile.phase_h, column.r) - tile.first_h;
          const int shift_w = plan.w.shift(tile.phase_w, column.s) - tile.first_w;
          const int pixel = plan.by_columns ? 0 : shift_h * plan.patch_w + shift_w;
          entry.offset = unit % plan.chunk * plan.plane() + (pixel << plan.vectors_shift);
        }
      } else {
        unit = 0;
        entry.offset = index;
      }
    }
  }
  if (lane == r) cursors.next += min(left, kWindow);
  cursors.unit[r] = unit;
  const unsigned live = __ballot_sync(kAllLanes, unit != kNone);
  __syncwarp();  // all lanes have read what is overwritten
  if (unit != kNone) window[__popc(live & ((1u << lane) - 1))] = entry;
  __syncwarp();
}

// Calls use(first, last) for the parts of the window of row r, as it moves on, that hold entries of units [begin, end).
template <bool kStaged, int kRows, class E, class What, class Use>
__device__ void for_each_part(const Plan& plan, const Pattern& pattern, const Tile& tile, int begin, int end,
                              Cursors<kRows>& cursors, int r, E* window, const What& what, const Use& use) {
  for (;;) {
    const int unit = cursors.unit[r];
    const int first = __popc(__ballot_sync(kAllLanes, unit < begin));
    const int last = __popc(__ballot_sync(kAllLanes, unit < end));
    if (first < last) use(first, last);
    if (last < __popc(__ballot_sync(kAllLanes, unit != kNone))) return;
    if (__shfl_sync(kAllLanes, cursors.next, r) == __shfl_sync(kAllLanes, cursors.end, r)) return;
    fill<kStaged>(plan, pattern, tile, cursors, r, window, what);
  }
}

// ---- on the host

// Sets the tiles, of up to `capacity` vectors, and the patch: those for which the work is least, as guessed from what
// the warps read (`capacity` vectors a tile, of a tenth of the taps in each of 20 rows) and what is staged.
template <class T>
void lay_out(Plan& plan, int capacity) {
  const int64_t across = groups_of(plan.batch, kLanes<T>), taps = plan.taps;
  const auto most = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(across, capacity))));
  const int64_t high = plan.h.positions(), wide = plan.w.positions(), channels = plan.columns / taps;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t vectors = std::min<int64_t>(8, most); vectors <= most; vectors *= 2)
    for (int64_t tile_w = 1; tile_w <= std::min(wide, capacity / vectors); ++tile_w)
      for (const bool by_columns : {true, false}) {
        const int64_t tile_h = std::min(high, capacity / (vectors * tile_w));
        const int64_t patch_h = by_columns ? tile_h : (tile_h - 1) * plan.h.step + plan.h.reach() + 1;
        const int64_t patch_w = by_columns ? tile_w : (tile_w - 1) * plan.w.step + plan.w.reach() + 1;
        if (double(patch_h) * double(patch_w) * double(vectors) * 16 > kPatchBytes<T>) continue;
        const int64_t tiles_h = groups_of(high, tile_h), tiles_w = groups_of(wide, tile_w);
        const int64_t tiles_n = groups_of(across, vectors), staged = patch_h * patch_w * vectors;
        const double cost = double(tiles_h) * double(tiles_w) * double(tiles_n) *
                            (2.0 * capacity * double(taps) + double(by_columns ? staged * taps : staged));
        if (cost >= least) continue;
        least = cost;
        plan.by_columns = by_columns, plan.vectors_shift = std::countr_zero(static_cast<uint64_t>(vectors));
        plan.tile_h = static_cast<int>(tile_h), plan.tile_w = static_cast<int>(tile_w);
        plan.patch_h = static_cast<int>(patch_h), plan.patch_w = static_cast<int>(patch_w);
        plan.tiles_h = tiles_h, plan.tiles_w = tiles_w, plan.tiles_n = tiles_n;
      }
  plan.units = plan.by_columns ? plan.columns : static_cast<int>(channels);
  const int64_t room = kPatchBytes<T> / (plan.plane() * 16), chunks = std::max<int64_t>(groups_of(plan.units, room), 1);
  plan.chunk = static_cast<int>(std::max<int64_t>(groups_of(plan.units, chunks), 1));
}

// Where source and result are one pixel, or as good as one; every row of a plane is then one long batch.
inline bool is_one_pixel(const Convolution& c) { return c.h.is_pointwise() && c.w.is_pointwise(); }

inline Axis axis_of(const cpu::Window& w, bool transposed) {
  const auto in = static_cast<int>(w.in), out = static_cast<int>(w.out), taps = static_cast<int>(w.taps);
  const auto stride = static_cast<int>(w.stride), padding = static_cast<int>(w.padding);
  const auto dilation = static_cast<int>(w.dilation);
  if (transposed) return {out, in, taps, 1, stride, padding, -dilation};
  return {in, out, taps, stride, 1, -padding, dilation};
}

// The plan of a product, but for its tiles.
inline Plan plan_of(const Convolution& c, const Pattern& pattern, bool transposed) {
  Plan plan{};
  plan.h = axis_of(c.h, transposed), plan.w = axis_of(c.w, transposed);
  plan.batch = c.batch;
  if (is_one_pixel(c)) {
    plan.batch *= c.h.in * c.w.in;
    plan.h = plan.w = {1, 1, 1, 1, 1, 0, 0};
  }
  plan.rows = static_cast<int>(pattern.rows);
  plan.columns = static_cast<int>(pattern.columns), plan.taps = plan.h.taps * plan.w.taps;
  return plan;
}

}  // namespace exssnet::cuda
