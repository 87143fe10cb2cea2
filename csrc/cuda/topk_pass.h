// The pass over the scores, used by topk.cu, and by adam.cu while the new scores are still in registers. topk_settle.h
// has what follows it.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/topk.h"

namespace exssnet::cuda {

constexpr int kWarps = 8;           // warps of a block that passes over all layers
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocks = 16;         // such blocks per multiprocessor, enough to balance the load
constexpr int kBins = 1 << 11;      // bins of a histogram
constexpr unsigned kAll = 0xffffffffu;

// S: integer type of the bits of a score: int16_t, int32_t or int64_t. Wide: the type for calculations with magnitudes.
// A negative magnitude means that there is no score.
template <class S>
using Wide = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
template <class S>
constexpr int kWidth = 16 / sizeof(S);  // scores in a vector
template <class S>
constexpr int kVectors = sizeof(S) == 2 ? 2 : 4;  // vectors that a lane holds at a time, limited by the registers
template <class S>
constexpr int64_t kStrip = 32 * kVectors<S> * kWidth<S>;  // scores that a warp holds at a time
template <class S>
constexpr int64_t kTile = kWarps * kStrip<S>;
template <class S>
constexpr Wide<S> kMagnitude = std::numeric_limits<S>::max();  // bit mask of magnitudes, and the largest one

// An entry inside the bracket: 31 bits of magnitude and 33 bits of index, or 64 bits each.
struct Candidate64 {
  int64_t magnitude, index;
};
template <class S>
using Candidate = std::conditional_t<sizeof(S) == 8, Candidate64, uint64_t>;

__device__ inline void put(uint64_t& candidate, int64_t magnitude, int64_t index) {
  candidate = static_cast<uint64_t>(magnitude) << 33 | static_cast<uint64_t>(index);
}
__device__ inline void put(Candidate64& candidate, int64_t magnitude, int64_t index) { candidate = {magnitude, index}; }
__device__ inline int64_t magnitude_of(uint64_t candidate) { return static_cast<int64_t>(candidate >> 33); }
__device__ inline int64_t magnitude_of(const Candidate64& candidate) { return candidate.magnitude; }
__device__ inline int64_t index_of(uint64_t candidate) { return static_cast<int64_t>(candidate & ((1ull << 33) - 1)); }
__device__ inline int64_t index_of(const Candidate64& candidate) { return candidate.index; }

using Count = unsigned long long;

// The next step of a layer: a pass, histograms for a narrower bracket, the mask of equal entries.
enum class Phase { scan, narrow, paint, nothing };

// A layer, as stored in the workspace.
struct Work {
  TopkLayer layer;
  int64_t first_tile;  // the tiles of all layers are numbered consecutively
  int64_t tiles;       // of this layer
  Count done;          // tiles that blocks have reported in this pass
  bool aligned;        // whether the memory is aligned to vectors
  Phase phase;
  int64_t lo, hi;      // the bracket, inclusive
  int64_t sample;      // size of the sample that gives the next bracket if this one misses; 0: no sample any more
  Count above;         // entries above the bracket
  Count inside;        // entries in the bracket
  void* candidates;    // entries in the bracket, in any order, as many as fit
  int64_t capacity;
  unsigned* ties;      // per strip: number of entries inside a bracket of one value
  Count* bins;         // kBins: histogram of the candidates over the bracket
};

struct Workspace {
  Work* works;
  int layers;
  int64_t tiles;
  int64_t infinity;    // bits of infinity
  unsigned* ties;      // ties of all layers
  Count* bins;
  unsigned* missed;    // number of layers whose first bracket failed
  unsigned* tied;      // number of layers that wait for paint() after the first pass
  int32_t* nan_flag;
};

__device__ inline int lane() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp() { return static_cast<int>(threadIdx.x / 32); }

__device__ inline unsigned warp_sum(unsigned x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Calls body(layer, tile, end) for each layer in this block's share of the tiles. Tiles are numbered within the layer.
template <class Body>
__device__ void for_each_layer(const Workspace& space, Body&& body) {
  int64_t tile = space.tiles * blockIdx.x / gridDim.x;
  const int64_t end = space.tiles * (blockIdx.x + 1) / gridDim.x;
  unsigned begun = 0;
  for (int i = lane(); i < space.layers; i += 32) begun += space.works[i].first_tile <= tile;
  for (int i = static_cast<int>(warp_sum(begun)) - 1; tile < end; ++i) {
    const int64_t first = space.works[i].first_tile;
    const int64_t last = i + 1 < space.layers ? min(end, space.works[i + 1].first_tile) : end;
    if (tile < last) body(i, tile - first, last - first);
    tile = last;
  }
}

// First entry of the lane's vector v in a strip.
template <class S>
__device__ int64_t place(int64_t strip, int v) {
  return strip * kStrip<S> + (v * 32 + lane()) * kWidth<S>;
}

template <class S>
__device__ int64_t magnitude(const TopkLayer& layer, int64_t i) {
  S bits;
  memcpy(&bits, static_cast<const S*>(layer.scores) + i, sizeof bits);  // it may have been stored as a float
  return bits & kMagnitude<S>;
}

// Magnitudes of the vector of scores at i; -1 beyond the end. whole: the vector is aligned and complete.
template <class S>
__device__ void load(const S* scores, int64_t i, int64_t n, bool whole, S (&magnitudes)[kWidth<S>]) {
  if (whole) {
    const uint4 vector = *reinterpret_cast<const uint4*>(scores + i);
    memcpy(magnitudes, &vector, 16);
    for (S& x : magnitudes) x &= kMagnitude<S>;
  } else {
    for (int j = 0; j < kWidth<S>; ++j)
      magnitudes[j] = i + j < n ? static_cast<S>(scores[i + j] & kMagnitude<S>) : S{-1};
  }
}

// Source of a pass over the scores in memory.
template <class S>
struct Stored {
  __device__ void operator()(const Work& w, int, int64_t i, bool whole, S (&magnitudes)[kWidth<S>]) const {
    load(static_cast<const S*>(w.layer.scores), i, w.layer.n, whole, magnitudes);
  }
};

// Writes the bits of the warp's vectors at i to a packed mask. Unused bits of its last byte are zero.
template <class S>
__device__ void store_bits(uint8_t* mask, int64_t i, int64_t n, unsigned bits) {
  for (int width = kWidth<S>; width < 8; width *= 2)
    bits |= __shfl_down_sync(kAll, bits, width / kWidth<S>) << width;
  if (i % 8 == 0 && i < n) mask[i / 8] = static_cast<uint8_t>(bits);
}

// Results of a block for its share of a layer. They are added to the layer once, at the end, because many atomic
// operations on one address wait for each other.
template <class S>
struct Found {
  static constexpr unsigned kRoom = 512;
  Candidate<S> candidates[kRoom];
  Count first;     // position of the first of them among the layer's candidates
  unsigned count;  // number of candidates, including those that did not fit
  unsigned end;    // number of the first candidate that did not fit
  Count above, equal;
};

constexpr int kMostWarps = 16;  // of a block that uses the memory below
constexpr unsigned kFew = 512;

// Shared memory of a block.
template <class S>
struct Shared {
  int64_t sums[kMostWarps];
  int64_t position, rank;
  int64_t threshold, tie;
  unsigned tail;  // bits of a packed mask after its last complete word
  unsigned count;
  bool last;      // whether this block is the last one of a layer
  union {
    Found<S> found;
    unsigned bins[kBins];
    Candidate<S> few[kFew];
  };
};

// The shift that distributes values 0 ... range over the bins.
__device__ inline int bin_shift(int64_t range) { return max(0, 64 - __clzll(range) - 11); }

__device__ inline void count_candidate(const Work& w, int64_t magnitude) {
  atomicAdd(&w.bins[(magnitude - w.lo) >> bin_shift(w.hi - w.lo)], Count{1});
}

// Adds the entries of a strip that are inside the bracket to the candidates: entry j of the lane's vector v if bit
// v * kWidth + j of `inside` is set. There are few of them, so they are read again, which saves registers.
template <class S>
__device__ void collect(Work& w, Found<S>& found, int64_t strip, unsigned inside) {
  const auto count = static_cast<unsigned>(__popc(inside));
  unsigned before = count;  // becomes the sum over this lane and the lanes before it
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(kAll, before, step);
    before += lane() >= step ? other : 0;
  }
  const unsigned all = __shfl_sync(kAll, before, 31);
  Candidate<S>* to = found.candidates;
  bool held = true;
  Count next = 0;
  if (lane() == 0) next = atomicAdd(&found.count, all);
  next = __shfl_sync(kAll, next, 0);
  if (next + all > Found<S>::kRoom) {
    to = static_cast<Candidate<S>*>(w.candidates);
    held = false;
    if (lane() == 0) {
      atomicMin(&found.end, static_cast<unsigned>(next));
      next = atomicAdd(&w.inside, static_cast<Count>(all));
    }
    next = __shfl_sync(kAll, next, 0);
    if (next + all > static_cast<Count>(w.capacity)) return;  // too many candidates: settle() handles it
  }
  to += next + (before - count);
  for (; inside != 0; inside &= inside - 1) {
    const int bit = __ffs(static_cast<int>(inside)) - 1;
    const int64_t i = place<S>(strip, bit / kWidth<S>) + bit % kWidth<S>;
    const int64_t m = magnitude<S>(w.layer, i);
    put(*to++, m, i);
    if (!held) count_candidate(w, m);
  }
}

// Adds the results of a block to the layer. Called by all threads.
template <class S>
__device__ void tell(Work& w, Found<S>& found) {
  __syncthreads();
  const unsigned held = min(found.count, found.end);
  if (threadIdx.x == 0) {
    if (found.above > 0) atomicAdd(&w.above, found.above);
    if (held + found.equal > 0) found.first = atomicAdd(&w.inside, held + found.equal);
  }
  __syncthreads();
  if (held == 0 || found.first + held > static_cast<Count>(w.capacity)) return;
  auto* const candidates = static_cast<Candidate<S>*>(w.candidates) + found.first;
  for (unsigned i = threadIdx.x; i < held; i += kThreads) {
    candidates[i] = found.candidates[i];
    count_candidate(w, magnitude_of(found.candidates[i]));
  }
}

// Of some tiles of a layer: counts the entries above and inside the bracket, writes the mask as if no entries inside
// were kept, and collects the candidates inside, with their histogram. A bracket of one value may contain very many
// entries, which are only counted, per strip. A strip is processed by one warp.
template <class S, class Source>
__device__ void scan_tiles(const Workspace& space, int number, int64_t tile, int64_t end, const Source& read,
                           Found<S>& found) {
  using B = Wide<S>;
  using U = std::make_unsigned_t<B>;
  using Bytes = std::conditional_t<kWidth<S> == 8, uint64_t, std::conditional_t<kWidth<S> == 4, uint32_t, uint16_t>>;
  Work& w = space.works[number];
  __syncthreads();  // no thread reads the results of the previous layer any more
  if (threadIdx.x == 0) found.count = found.above = found.equal = 0, found.end = Found<S>::kRoom;
  __syncthreads();
  const int64_t n = w.layer.n;
  const B lo = static_cast<B>(w.lo), hi = static_cast<B>(w.hi), infinity = static_cast<B>(space.infinity);
  const U range = static_cast<U>(hi) - static_cast<U>(lo);
  uint8_t* const mask = w.layer.mask;
  const bool packed = mask && w.layer.packed;
  unsigned above = 0, equal = 0;
  bool nan = false;
  for (; tile < end; ++tile) {
    const int64_t strip = tile * kWarps + warp();
    if (strip * kStrip<S> >= n) break;
    const bool whole = w.aligned && (strip + 1) * kStrip<S> <= n;
    S magnitudes[kVectors<S>][kWidth<S>];
#pragma unroll
    for (int v = 0; v < kVectors<S>; ++v) read(w, number, place<S>(strip, v), whole, magnitudes[v]);
    unsigned inside = 0;
#pragma unroll
    for (int v = 0; v < kVectors<S>; ++v) {
      Bytes bytes = 0;
      unsigned bits = 0;
#pragma unroll
      for (int j = 0; j < kWidth<S>; ++j) {
        const B b = magnitudes[v][j];
        const bool is_above = b > hi, is_inside = static_cast<U>(b) - static_cast<U>(lo) <= range;
        above += is_above;
        nan |= b > infinity;
        inside |= static_cast<unsigned>(is_inside) << (v * kWidth<S> + j);
        bytes |= static_cast<Bytes>(static_cast<Bytes>(is_above) << (8 * j));
        bits |= static_cast<unsigned>(is_above) << j;
      }
      const int64_t i = place<S>(strip, v);
      if (packed) store_bits<S>(mask, i, n, bits);
      else if (mask && whole) *reinterpret_cast<Bytes*>(mask + i) = bytes;
      else if (mask)
#pragma unroll 1
        for (int j = 0; j < kWidth<S> && i + j < n; ++j) mask[i + j] = static_cast<uint8_t>(bytes >> (8 * j));
    }
    if (range == 0) {
      const unsigned count = warp_sum(static_cast<unsigned>(__popc(inside)));
      equal += count;
      if (lane() == 0) w.ties[strip] = count;
    } else if (__any_sync(kAll, inside != 0)) {
      collect<S>(w, found, strip, inside);
    }
  }
  above = warp_sum(above);
  if (lane() == 0 && above > 0) atomicAdd(&found.above, Count{above});
  if (lane() == 0 && equal > 0) atomicAdd(&found.equal, Count{equal});
  if (nan) atomicExch(space.nan_flag, 1);
  tell(w, found);
}

// Whether this block is the last one to report its tiles of a layer. Then it sees what the other blocks wrote.
__device__ inline bool is_last(Work& w, int64_t tiles, bool& last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&w.done, static_cast<Count>(tiles)) + static_cast<Count>(tiles) == static_cast<Count>(w.tiles);
    if (last) w.done = 0;  // for another pass
  }
  __syncthreads();
  __threadfence();
  return last;
}

// Returns the error of a launch to the caller.
#define EXSSNET_TRY(launch) \
  if (const cudaError_t error = (launch); error != cudaSuccess) return error

// A layer, as passed from the host.
struct Entry {
  TopkLayer layer;
  int64_t first_tile, sample;  // sample: size of the sample
  void* candidates;
};

// Positions in the workspace for layers of one dtype.
struct Plan {
  std::vector<Entry> entries;
  Workspace space{};
  size_t bytes = 0;
};
Plan topk_plan(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace);

// The last launch: for layers that the pass did not finish.
cudaError_t topk_rescue(const Workspace& space, Float dtype, int processors, cudaStream_t stream);

// The grid of a pass. There is at least one block, even if there are no tiles.
inline unsigned pass_blocks(const Workspace& space, int processors) {
  return static_cast<unsigned>(std::clamp<int64_t>(space.tiles, 1, int64_t{kBlocks} * processors));
}

}  // namespace exssnet::cuda
