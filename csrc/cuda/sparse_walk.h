// How the sparse products of sparse.cu are organized: tiles of results, patches of sources, entries of rows.
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
constexpr int kMostRows = sizeof(T) == 8 ? 2 : 4;  // rows of a warp
template <class T>
constexpr int kHeld = sizeof(T) == 2 ? 2 : 4;  // vectors of a row that a lane sums, limited by the registers

__host__ __device__ constexpr int64_t groups_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A kept weight for a warp: the position of its source, and its value or slot.
template <class What>
struct alignas(2 * sizeof(What)) Entry {
  int offset;
  What what;
};

// The next entries of a row, in order. Entries that are left out are not in the window.
template <class What>
struct Window {
  Entry<What> entries[32];
  int unit[32];  // unit of each lane's entry, or kNone; in shared memory to save registers
};

// Size of a patch with its chart. With two patches and all windows, a block uses less than 82 KB: two blocks fit into a
// multiprocessor of an A100 or H100, one into that of an RTX 4090. The size is the same for all GPUs, because the order
// of sums depends on it.
constexpr int kPatchBytes = 34 << 10;

// Height or width of a product, forward or transposed. The pixels of the result are split into phases. For tap t, pixel
// a + phases * i of the result, which belongs to phase a, reads pixel step * i + shift(a, t) of the source, if the tap
// is live in this phase. A forward product has one phase.
struct Axis {
  int in, out;  // number of pixels of the source and of the result
  int taps, step, phases;
  int offset, slope;

  __device__ int moved(int a, int t) const { return offset + a + slope * t; }
  __device__ bool live(int a, int t) const { return phases == 1 || moved(a, t) % phases == 0; }
  __device__ int shift(int a, int t) const { return phases == 1 ? moved(a, t) : moved(a, t) / phases; }
  // A lower bound of the shifts of live taps. Their quotients are exact, so the direction of rounding does not matter.
  __device__ int first(int a) const { return shift(a, slope < 0 ? taps - 1 : 0); }
  int64_t reach() const { return ((slope < 0 ? -slope : slope) * (taps - int64_t{1}) + phases - 1) / phases; }
  int64_t positions() const { return groups_of(out, phases); }  // positions of the first phase, which is the longest
};

// The layout of a product. A patch holds several units. A unit is a channel, or the source of one column of the
// pattern.
struct Plan {
  Axis h, w;
  int64_t batch;
  int rows, columns, taps;
  int units, chunk;            // chunk: units per patch; there are two patches if one does not hold all units
  bool by_columns, charted;    // charted: a chart, shared by all units, lists the sources of a patch
  int chart_vectors;           // size of the chart in vectors
  int vectors_shift;           // log2 of the vectors of images in a tile
  int tile_h, tile_w;          // positions in a tile
  int patch_h, patch_w;        // pixels of a unit in a patch
  int64_t tiles_h, tiles_w, tiles_n;

  __host__ __device__ int vectors() const { return 1 << vectors_shift; }
  __host__ __device__ int plane() const { return patch_h * patch_w << vectors_shift; }  // number of vectors of a unit
  int64_t tiles() const { return int64_t{h.phases} * w.phases * tiles_n * tiles_h * tiles_w; }
};

// A tile: its phases, their smallest shifts, its first positions and its first image. It is in shared memory, which
// saves registers.
struct Tile {
  int phase_h, phase_w, first_h, first_w, h, w;
  int64_t n;
};

// Sets the tile of the block. Called by all threads.
template <class T>
__device__ void enter(const Plan& plan, int64_t index, Tile& tile) {
  __syncthreads();  // no thread uses the previous tile any more
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

// Loads the vector at `from`. Only `left` elements exist; the others are set to zero.
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

// Vector v of this lane in a tile: its start in a plane of the patch, in bytes, and in a plane of the result. The
// latter is negative if the result has no such pixel or image.
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
  return {16 * (((i * step_h * plan.patch_w + j * step_w) << plan.vectors_shift) + n),
          there ? (h * plan.w.out + w) * plan.batch + image : -1, image};
}

// A column of the pattern: channel, and row and column of the tap.
struct Column {
  int channel, r, s;

  __device__ Column(const Plan& plan, int column) {
    channel = column / plan.taps;
    const int tap = column - channel * plan.taps;
    r = tap / plan.w.taps, s = tap - r * plan.w.taps;
  }
};

// Writes the chart: for each vector of a unit in the patch, its source as a number of vectors from the start of the
// unit, or -1 for zeros. Called by all threads.
template <class T>
__device__ void draw_chart(const Plan& plan, const Tile& tile, int* chart) {
  for (int v = static_cast<int>(threadIdx.x); v < plan.plane(); v += kSparseThreads) {
    const int pixel = v >> plan.vectors_shift, i = pixel / plan.patch_w, j = pixel - i * plan.patch_w;
    const int h = tile.h * plan.h.step + tile.first_h + i, w = tile.w * plan.w.step + tile.first_w + j;
    const int64_t image = tile.n + (v & (plan.vectors() - 1)) * kLanes<T>;
    const bool there = 0 <= h && h < plan.h.in && 0 <= w && w < plan.w.in && image < plan.batch;
    chart[v] = there ? static_cast<int>(((int64_t{h} * plan.w.in + w) * plan.batch + image) / kLanes<T>) : -1;
  }
}

// Starts to copy what a tile reads of units [begin, end) of x, with the chart. Called by all threads.
template <class T>
__device__ void stage_charted(const Plan& plan, int begin, int end, const T* x, const int* chart, uint4* patch) {
  const int plane = plan.plane(), count = (end - begin) * plane, thread = static_cast<int>(threadIdx.x);
  const int units = kSparseThreads / plane, rest = kSparseThreads - units * plane, unit = thread / plane;
  const int64_t size = int64_t{plan.h.in} * plan.w.in * plan.batch / kLanes<T>;  // size of a unit
  const uint4* from = reinterpret_cast<const uint4*>(x) + (begin + unit) * size;
  int v = thread - unit * plane;
#pragma unroll 2
  for (int k = thread; k < count; k += kSparseThreads) {
    const int at = chart[v];
    copy_async(patch + k, from + max(at, 0), at >= 0);
    v += rest, from += units * size;
    if (v >= plane) v -= plane, from += size;
  }
}

// The same without a chart: for units that are columns, and for vectors that are not aligned.
template <class T>
__device__ void stage_each(const Plan& plan, const Tile& tile, int begin, int end, const T* x, uint4* patch) {
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

// Starts to fill a patch with what a tile reads of units [begin, end) of x. Pixels and images that do not exist are
// zeros. A thread's copies are complete after await_copies(). Called by all threads, with the chart of the tile.
template <class T>
__device__ void stage(const Plan& plan, const Tile& tile, int begin, int end, const T* x, const int* chart,
                      uint4* patch) {
  if (plan.charted) stage_charted(plan, begin, end, x, chart, patch);
  else stage_each(plan, tile, begin, end, x, patch);
}

// Calls use(begin, end, patch) for the chunks of units [first, last), as soon as the patch of a chunk is filled.
// Meanwhile the other patch is filled for the next chunk. Called by all threads.
template <class T, bool kStaged, class Use>
__device__ void for_each_chunk(const Plan& plan, const Tile& tile, int first, const int& last, const T* x,
                               const int* chart, uint4* patches, const Use& use) {
  if constexpr (!kStaged) return use(first, last, patches);
  __syncthreads();  // the chart is complete, and no thread reads the previous patches any more
  const auto next = [&](int end) { return end + min(plan.chunk, last - end); };
  const auto patch_of = [&](int begin) {
    return patches + (begin - first) / plan.chunk % 2 * plan.chunk * plan.plane();
  };
#pragma unroll 1
  for (int begin = first, end = first;; begin = end, end = next(end)) {
    if (end < last) stage(plan, tile, end, next(end), x, chart, patch_of(end));
    if (begin < end) use(begin, end, patch_of(begin));
    if (end == last) return;
    await_copies();
    __syncthreads();  // one patch is filled, and no thread reads the other one any more
  }
}

// The entries [begin, end) of a row. The range is empty if the pointers are out of range.
struct Range {
  int begin, end;

  __device__ Range(const Pattern& pattern, int64_t row) {
    const auto entries = static_cast<int>(pattern.entries);
    begin = min(max(pattern.ptr[row], 0), entries), end = min(max(pattern.ptr[row + 1], begin), entries);
  }
};

// Sorts the kRows * kSparseWarps rows of a group by length, so that each warp gets long and short rows. Called by all
// threads.
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

// Row number r of this warp, or plan.rows if there is no such row.
template <int kRows>
__device__ int row_of(const Plan& plan, int64_t group, const int* order, int r) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int dealt = r * kSparseWarps + (r % 2 == 0 ? warp : kSparseWarps - 1 - warp);
  return static_cast<int>(min(group * kRows * kSparseWarps + (kRows == 1 ? dealt : order[dealt]), int64_t{plan.rows}));
}

// Position of a warp in its rows. Lane r holds the next entry and the end of row r.
struct Cursor {
  int next = 0, end = 0;
};

// Sets the cursor to the first entry of each row whose unit is at least `begin`, and empties the windows.
template <int kRows, class What>
__device__ Cursor begin_rows(const Plan& plan, const Pattern& pattern, int64_t group, const int* order, int begin,
                             Window<What>* windows) {
  const int r = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < kRows; ++i) windows[i].unit[r] = kNone;
  const int row = r < kRows ? row_of<kRows>(plan, group, order, r) : plan.rows;
  if (row == plan.rows) return {};
  const Range entries(pattern, row);
  int next = entries.begin;
  const int64_t column = int64_t{begin} * (plan.by_columns ? 1 : plan.taps);
  for (int last = entries.end; column > 0 && next < last;) {
    const int middle = next + (last - next) / 2;
    if (pattern.index[middle] < column) next = middle + 1;
    else last = middle;
  }
  return {next, entries.end};
}

// Fills the window of row r with its next entries. value(slot, entry.what) returns whether an entry is used. Offsets
// are bytes in the patch or, if x is not staged, channels.
template <bool kStaged, class What, class Value>
__device__ void fill(const Plan& plan, const Pattern& pattern, const Tile& tile, Cursor& cursor, int r,
                     Window<What>& window, const Value& value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int next = __shfl_sync(kAllLanes, cursor.next, r), left = __shfl_sync(kAllLanes, cursor.end, r) - next;
  Entry<What> entry;
  int unit = kNone;
  if (lane < left) {
    const int index = pattern.index[next + lane];
    if (0 <= index && index < plan.columns && value(pattern.slot[next + lane], entry.what)) {
      if (kStaged) {
        const Column column(plan, index);
        if (plan.h.live(tile.phase_h, column.r) && plan.w.live(tile.phase_w, column.s)) {
          unit = plan.by_columns ? index : column.channel;
          const int shift_h = plan.h.shift(tile.phase_h, column.r) - tile.first_h;
          const int shift_w = plan.w.shift(tile.phase_w, column.s) - tile.first_w;
          const int pixel = plan.by_columns ? 0 : shift_h * plan.patch_w + shift_w;
          entry.offset = 16 * (unit % plan.chunk * plan.plane() + (pixel << plan.vectors_shift));
        }
      } else {
        unit = 0;
        entry.offset = index;
      }
    }
  }
  if (lane == r) cursor.next += min(left, 32);
  window.unit[lane] = unit;
  const unsigned live = __ballot_sync(kAllLanes, unit != kNone);
  __syncwarp();  // no lane reads the old entries any more
  if (unit != kNone) window.entries[__popc(live & ((1u << lane) - 1))] = entry;
  __syncwarp();
}

// Calls use(first, last) for the entries of row r in units [begin, end). They are at [first, last) in the window, which
// is refilled as often as needed.
template <bool kStaged, class What, class Value, class Use>
__device__ void for_each_part(const Plan& plan, const Pattern& pattern, const Tile& tile, int begin, int end,
                              Cursor& cursor, int r, Window<What>& window, const Value& value, const Use& use) {
  for (;;) {
    const int unit = window.unit[threadIdx.x % 32];
    const int first = __popc(__ballot_sync(kAllLanes, unit < begin));
    const int last = __popc(__ballot_sync(kAllLanes, unit < end));
    if (first < last) use(first, last);
    if (last < __popc(__ballot_sync(kAllLanes, unit != kNone))) return;
    if (__shfl_sync(kAllLanes, cursor.next, r) == __shfl_sync(kAllLanes, cursor.end, r)) return;
    fill<kStaged>(plan, pattern, tile, cursor, r, window, value);
  }
}

// ---- Host code

// Chooses the tiles, of up to `capacity` vectors, and the patch with the smallest estimated work. The estimate counts
// the vectors that the warps read (`capacity` vectors per tile, for a tenth of the taps in each of 20 rows) and those
// that are staged.
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
        if (double(patch_h) * double(patch_w) * double(vectors) * 20 + 16 > kPatchBytes) continue;
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
  plan.chart_vectors = (plan.plane() + 3) / 4;
  const int64_t room = (kPatchBytes / 16 - plan.chart_vectors) / plan.plane();
  const int64_t chunks = std::max<int64_t>(groups_of(plan.units, room), 1);
  plan.chunk = static_cast<int>(std::max<int64_t>(groups_of(plan.units, chunks), 1));
}

// Whether a pixel of the result reads only the same pixel of the source. A plane is then treated as one long batch.
inline bool is_one_pixel(const Convolution& c) { return c.h.is_pointwise() && c.w.is_pointwise(); }

inline Axis axis_of(const exssnet::Window& w, bool transposed) {
  const auto in = static_cast<int>(w.in), out = static_cast<int>(w.out), taps = static_cast<int>(w.taps);
  const auto stride = static_cast<int>(w.stride), padding = static_cast<int>(w.padding);
  const auto dilation = static_cast<int>(w.dilation);
  if (transposed) return {out, in, taps, 1, stride, padding, -dilation};
  return {in, out, taps, stride, 1, -padding, dilation};
}

// Whether a chart can be used: the vectors of the patch are vectors of x, and their number fits into int32.
template <class T>
bool can_chart(const Plan& plan, const T* x) {
  const double vectors = double(plan.h.in) * double(plan.w.in) * double(plan.batch) / kLanes<T>;
  return !plan.by_columns && in_vectors(x, plan.batch) && vectors <= std::numeric_limits<int>::max();
}

// The plan of a product, without its tiles.
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
