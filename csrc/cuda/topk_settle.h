// What precedes and follows the pass over the scores of a layer: its bracket, and the k-th largest of its candidates.
// Unless they say otherwise, the functions are called by all threads of a block, which works on one layer.
#pragma once

#include "cuda/topk_pass.h"

namespace exssnet::cuda {

constexpr int64_t kSmall = 1 << 12;  // in layers up to this size all entries are candidates

struct Interval {
  int64_t low, high;
  int64_t count;  // number of values in it
  __device__ bool holds(int64_t x) const { return low <= x && x <= high; }
};

// The first position in [begin, end) where the running sum of count(position) reaches the rank. The rank is reduced to
// the rank within that position. Returns begin if the sum never reaches the rank.
template <class S, class CountAt>
__device__ int64_t reach(int64_t begin, int64_t end, int64_t& rank, Shared<S>& shared, const CountAt& count) {
  for (;;) {
    const int64_t share = (end - begin + blockDim.x - 1) / blockDim.x;
    const int64_t first = min(begin + threadIdx.x * share, end), last = min(first + share, end);
    int64_t sum = 0;
    for (int64_t i = first; i < last; ++i) sum += count(i);
    int64_t before = sum;  // becomes the sum of the counts before `first`
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kAll, before, step);
      before += lane() >= step ? other : 0;
    }
    if (lane() == 31) shared.sums[warp()] = before;
    if (threadIdx.x == 0) shared.position = begin, shared.rank = 1;
    __syncthreads();
    before -= sum;
    for (int w = 0; w < warp(); ++w) before += shared.sums[w];
    if (before < rank && rank <= before + sum) shared.position = first, shared.rank = rank - before;
    __syncthreads();
    begin = shared.position, end = min(begin + share, end), rank = shared.rank;
    __syncthreads();
    if (share <= 1) return begin;
  }
}

// One step of narrowing. The bins count the values in [low, high]. Returns the part that contains the value of the
// given rank (1 is the largest). The rank is reduced to the rank within this part.
template <class S, class Bins>
__device__ Interval narrowed(int64_t low, int64_t high, int64_t& rank, Shared<S>& shared, const Bins* bins) {
  const int shift = bin_shift(high - low);
  const int64_t bin =
      kBins - 1 - reach(0, kBins, rank, shared, [=](int64_t i) { return static_cast<int64_t>(bins[kBins - 1 - i]); });
  const int64_t first = low + (bin << shift);
  return {first, min(high, first + ((int64_t{1} << shift) - 1)), static_cast<int64_t>(bins[bin])};
}

// The part of an interval that contains, of value(i) for i < count, only the value of the given rank, or only values
// that are equal to it. The rank is reduced to the rank within that part.
template <class S, class Value>
__device__ Interval pick(Interval in, int64_t count, int64_t& rank, Shared<S>& shared, const Value& value) {
  while (in.low < in.high && in.count > 1) {
    const uint64_t width = in.high - in.low;
    const int shift = bin_shift(in.high - in.low);
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) shared.bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const uint64_t offset = static_cast<uint64_t>(value(i)) - static_cast<uint64_t>(in.low);
      if (offset <= width) atomicAdd(&shared.bins[offset >> shift], 1u);
    }
    __syncthreads();
    in = narrowed(in.low, in.high, rank, shared, shared.bins);
  }
  __syncthreads();
  return in;
}

// The bracket from a sample: order statistics four standard deviations around the expected rank. It misses the k-th
// largest in about one layer of ten thousand. The size n^(2/3) balances the costs of the sample and of the candidates.
// `drawn` is memory for the sample.
template <class S>
__device__ Interval sampled(const TopkLayer& layer, int64_t size, S* drawn, Shared<S>& shared) {
  const int64_t stride = layer.n / size;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    uint64_t random = (i + 1) * 0x9e3779b97f4a7c15ull;  // random position in each stride, in case of periodic scores
    random = (random ^ random >> 32) * 0xd6e8feb86659fd93ull >> 32;
    drawn[i] = static_cast<S>(magnitude<S>(layer, i * stride + static_cast<int64_t>(random * stride >> 32)));
  }
  __syncthreads();
  const double share = static_cast<double>(layer.k) / static_cast<double>(layer.n);
  const double rank = share * static_cast<double>(size), margin = 4 * sqrt(rank * (1 - share)) + 4;
  auto top = static_cast<int64_t>(rank - margin), bottom = static_cast<int64_t>(rank + margin);
  const auto value = [=](int64_t i) { return static_cast<int64_t>(drawn[i]); };
  const Interval all{0, kMagnitude<S>, size};
  Interval bracket = all;
  if (bottom <= size) bracket.low = pick(all, size, bottom, shared, value).low;
  if (top >= 1) bracket.high = pick(all, size, top, shared, value).high;
  return bracket;
}

__device__ inline bool usable(const int64_t* hint, int64_t infinity) {
  return hint && 0 <= hint[0] && hint[0] <= hint[1] && hint[1] <= infinity;
}

__host__ __device__ inline int64_t capacity(int64_t n) { return min(n, max(n / 16, int64_t{1} << 14)); }

// Prepares a pass with a bracket. Called by one thread.
__device__ inline void aim(Work& w, const Interval& bracket) {
  w.phase = Phase::scan;
  w.lo = bracket.low, w.hi = bracket.high;
  w.above = w.inside = 0;
}

// Writes the selection and the hint for the next call. crowd: entries per value of the bits, near the threshold. Called
// by one thread.
__device__ inline void finish(Work& w, int64_t threshold, int64_t tie, double crowd, int64_t infinity) {
  const TopkLayer& layer = w.layer;
  w.phase = Phase::nothing;
  layer.selection[0] = threshold, layer.selection[1] = tie;
  if (layer.hint == nullptr) return;
  int64_t low = layer.k > 0 ? threshold : 0, high = low;  // no bracket yet, only the threshold
  if (layer.k > 0 && layer.n > kSmall && usable(layer.hint, infinity)) {
    // Scores change little between steps. The next bracket extends four times as far as the threshold moved this time,
    // and it shrinks slowly. If it would hold too many candidates, a new sample in every call is cheaper.
    const double last_low = static_cast<double>(layer.hint[0]), last_high = static_cast<double>(layer.hint[1]);
    const double n = static_cast<double>(layer.n);
    const double moved = fabs(static_cast<double>(threshold) - (last_low + last_high) / 2);
    const double half = max(max(4 * moved, (last_high - last_low) * 3 / 8), max(n / 16384 / crowd, 1.0));
    if (2 * half * crowd <= n / 128) {
      const auto distance = static_cast<int64_t>(min(half, 0x1p62));
      low = threshold - min(distance, threshold), high = threshold + min(distance, infinity - threshold);
    }
  }
  layer.hint[0] = low, layer.hint[1] = high;
}

// Initializes a layer with its first bracket.
template <class S>
__device__ void begin_layer(const Entry& entry, const Workspace& space, int number, Shared<S>& shared) {
  const TopkLayer& layer = entry.layer;
  Work& w = space.works[number];
  Count* const bins = space.bins + static_cast<int64_t>(number) * kBins;
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) bins[i] = 0;
  Interval bracket{0, kMagnitude<S>, 0};
  bool hinted = false;
  if (layer.k == 0) bracket.low = kMagnitude<S>;
  else if (layer.n > kSmall) {
    hinted = usable(layer.hint, space.infinity) && layer.hint[0] < layer.hint[1];
    bracket = hinted ? Interval{layer.hint[0], layer.hint[1], 0}
                     : sampled(layer, entry.sample, static_cast<S*>(entry.candidates), shared);
  }
  if (threadIdx.x != 0) return;
  if (number == 0) *space.missed = *space.tied = 0;
  w.layer = layer;
  w.first_tile = entry.first_tile;
  w.tiles = (layer.n + kTile<S> - 1) / kTile<S>;
  w.done = 0;
  w.aligned = (reinterpret_cast<uintptr_t>(layer.scores) | reinterpret_cast<uintptr_t>(layer.mask)) % 16 == 0;
  w.sample = hinted ? entry.sample : 0;
  w.candidates = entry.candidates;
  w.capacity = capacity(layer.n);
  w.ties = space.ties + entry.first_tile * kWarps;
  w.bins = bins;
  aim(w, bracket);
  if (layer.k == 0) finish(w, kMagnitude<int64_t>, -1, 0, space.infinity);  // the pass still writes the mask
}

// Keeps a candidate. Its mask was written as if it was not kept. Bits of a packed mask after the last complete word are
// collected in shared.tail.
template <class S>
__device__ void keep(const TopkLayer& layer, int64_t i, Shared<S>& shared) {
  if (layer.mask == nullptr) return;
  if (!layer.packed) {
    layer.mask[i] = 1;
  } else {
    unsigned* const word = i < layer.n / 32 * 32 ? reinterpret_cast<unsigned*>(layer.mask) + i / 32 : &shared.tail;
    atomicOr(word, 1u << i % 32);
  }
}

// Selects the entry of the given rank among the candidates, all of which are in the workspace. Keeps those up to it.
template <class S>
__device__ void select_candidate(Work& w, int64_t rank, int64_t infinity, Shared<S>& shared) {
  const TopkLayer& layer = w.layer;
  const int64_t n = layer.n, lo = w.lo, inside = w.inside, all = rank;
  const double highest = static_cast<double>(w.hi), lowest = static_cast<double>(lo);
  const auto* candidates = static_cast<const Candidate<S>*>(w.candidates);
  const auto offset = [=](int64_t i) { return magnitude_of(candidates[i]) - lo; };
  const auto from_end = [=](int64_t i) { return n - 1 - index_of(candidates[i]); };  // ties go to the smaller index
  if (threadIdx.x == 0) shared.tail = shared.count = 0;
  Interval bin = narrowed(0, w.hi - lo, rank, shared, w.bins);
  if (bin.count <= kFew) {
    for (int64_t i = threadIdx.x; i < inside; i += blockDim.x)
      if (offset(i) > bin.high) keep(layer, index_of(candidates[i]), shared);
      else if (offset(i) >= bin.low) shared.few[atomicAdd(&shared.count, 1u)] = candidates[i];
    __syncthreads();
    for (unsigned i = threadIdx.x; i < bin.count; i += blockDim.x) {
      const int64_t m = magnitude_of(shared.few[i]), index = index_of(shared.few[i]);
      int64_t place = 1;
      for (unsigned j = 0; j < bin.count; ++j) {
        const int64_t other = magnitude_of(shared.few[j]);
        place += other > m || (other == m && index_of(shared.few[j]) < index);
      }
      if (place <= rank) keep(layer, index, shared);
      if (place == rank) shared.threshold = m, shared.tie = index;
    }
  } else {
    bin = pick(bin, inside, rank, shared, offset);
    Interval at{0, n - 1, bin.count};
    if (bin.count > 1)
      at = pick(at, inside, rank, shared, [=](int64_t i) { return offset(i) == bin.low ? from_end(i) : -1; });
    for (int64_t i = threadIdx.x; i < inside; i += blockDim.x) {
      const bool equal = bin.holds(offset(i));
      if (offset(i) > bin.high || (equal && from_end(i) >= at.low)) keep(layer, index_of(candidates[i]), shared);
      if (equal && at.holds(from_end(i))) shared.threshold = offset(i) + lo, shared.tie = index_of(candidates[i]);
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (layer.mask && layer.packed)
    for (int64_t i = n / 32 * 32; i < n; i += 8) layer.mask[i / 8] |= static_cast<uint8_t>(shared.tail >> i % 32);
  const double t = static_cast<double>(shared.threshold);
  const double crowd_above = static_cast<double>(all) / (highest - t + 1);
  const double crowd_below = static_cast<double>(inside - all + 1) / (t - lowest + 1);
  finish(w, shared.threshold, shared.tie, max(crowd_above, crowd_below), infinity);
}

// After a pass: selects the k-th largest, or sets a bracket that surely contains it. The phase says what is next.
template <class S>
__device__ void settle(Work& w, int64_t infinity, Shared<S>& shared) {
  if (w.phase == Phase::nothing) return;  // k = 0
  const TopkLayer& layer = w.layer;
  const int64_t n = layer.n, lo = w.lo, hi = w.hi;
  const int64_t above = w.above, inside = w.inside;
  int64_t rank = layer.k - above;  // rank of the k-th among the entries inside; 1 is the largest
  __syncthreads();                 // one thread changes these values below
  const bool hit = 1 <= rank && rank <= inside;
  if (hit && lo == hi) {
    const int64_t strip =
        reach(0, (n + kStrip<S> - 1) / kStrip<S>, rank, shared, [&](int64_t i) { return int64_t{w.ties[i]}; });
    const int64_t begin = strip * kStrip<S>;
    const int64_t tie = reach(begin, min(begin + kStrip<S>, n), rank, shared,
                              [&](int64_t i) { return int64_t{magnitude<S>(layer, i) == lo}; });
    if (threadIdx.x == 0) {
      finish(w, lo, tie, static_cast<double>(inside), infinity);
      if (layer.mask) w.phase = Phase::paint;
    }
  } else if (hit && inside <= w.capacity) {
    select_candidate(w, rank, infinity, shared);
  } else {
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) w.bins[i] = 0;
    if (threadIdx.x == 0) {
      const Interval bracket = rank < 1        ? Interval{hi + 1, kMagnitude<S>, above}
                               : rank > inside ? Interval{0, lo - 1, n - above - inside}
                                               : Interval{lo, hi, inside};
      aim(w, bracket);
      if (bracket.count > w.capacity && bracket.low < bracket.high) {
        w.phase = Phase::narrow;
        w.above = rank < 1 ? 0 : rank > inside ? above + inside : above;
      }
    }
  }
  __syncthreads();
}

// Narrows a bracket that surely contains the k-th largest, by a histogram of the scores inside.
template <class S>
__device__ void narrow(Work& w, Shared<S>& shared) {
  constexpr int64_t kPart = 1 << 19;  // tiles; their entries can be counted in 32 bits
  const uint64_t lo = w.lo, range = w.hi - w.lo;
  const int shift = bin_shift(w.hi - w.lo);
  int64_t rank = w.layer.k - static_cast<int64_t>(w.above);
  for (int64_t part = 0; part < w.tiles; part += kPart) {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) shared.bins[i] = 0;
    __syncthreads();
    const int64_t end = min((part + kPart) * kTile<S>, w.layer.n);
    for (int64_t i = part * kTile<S> + threadIdx.x; i < end; i += blockDim.x)
      if (const uint64_t offset = magnitude<S>(w.layer, i) - lo; offset <= range)
        atomicAdd(&shared.bins[offset >> shift], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += blockDim.x) w.bins[i] += shared.bins[i];
  }
  __syncthreads();
  const Interval bracket = narrowed(w.lo, w.hi, rank, shared, w.bins);
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) w.bins[i] = 0;
  if (threadIdx.x == 0) {
    const Count above = w.layer.k - rank;
    aim(w, bracket);
    if (bracket.count > w.capacity && bracket.low < bracket.high) w.phase = Phase::narrow, w.above = above;
  }
  __syncthreads();
}

// Sets the mask of entries that equal the threshold.
template <class S>
__device__ void paint(const Work& w, int64_t tile, int64_t end) {
  const TopkLayer& layer = w.layer;
  const int64_t tie = layer.selection[1], n = layer.n;
  for (; tile < end; ++tile) {
    const int64_t strip = tile * kWarps + warp();
    if (strip * kStrip<S> >= n || w.ties[strip] == 0) continue;
    for (int v = 0; v < kVectors<S>; ++v) {
      const int64_t i = place<S>(strip, v);
      unsigned bits = 0;
      for (int j = 0; j < kWidth<S> && i + j < n; ++j) {
        const int64_t m = magnitude<S>(layer, i + j);
        const bool kept = m > w.hi || (m == w.hi && i + j <= tie);
        bits |= static_cast<unsigned>(kept) << j;
        if (!layer.packed) layer.mask[i + j] = kept;
      }
      if (layer.packed) store_bits<S>(layer.mask, i, n, bits);
    }
  }
}

// The pass over the scores, and what follows it in the last block of each layer. A bracket of a hint that missed is
// replaced by one of a sample.
template <class S, class Source>
__device__ void scan_layers(const Workspace& space, const Source& read) {
  __shared__ Shared<S> shared;
  for_each_layer(space, [&](int number, int64_t tile, int64_t end) {
    Work& w = space.works[number];
    scan_tiles<S>(space, number, tile, end, read, shared.found);
    if (!is_last(w, end - tile, shared.last)) return;
    settle(w, space.infinity, shared);
    const Phase next = w.phase;
    if (next == Phase::nothing) return;
    if (next != Phase::paint && w.sample > 0) {
      const Interval bracket = sampled(w.layer, w.sample, static_cast<S*>(w.candidates), shared);
      if (threadIdx.x == 0) aim(w, bracket), w.sample = 0;
    }
    if (threadIdx.x == 0) atomicAdd(next == Phase::paint ? space.tied : space.missed, 1u);
  });
}

}  // namespace exssnet::cuda
