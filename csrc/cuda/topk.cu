#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "cuda/topk_pass.h"

// How it works. A layer has a bracket [lo, hi] of magnitude bits that almost surely contains the k-th largest
// magnitude. It comes from the hint of the last call, or from a sample of the scores. One pass over the scores
// (topk_pass.h) counts the entries above the bracket, writes the mask as if no other entries were kept, and collects
// the candidates inside. One block then selects the k-th largest among these few candidates and sets their mask bytes.
// If the bracket does not contain the k-th largest, histograms of the bits give a bracket that does, and the pass is
// repeated. All layers share the same launches. A layer that has nothing to do in a launch returns at once. The order
// of the candidates is arbitrary and does not affect the selection.

namespace exssnet::cuda {

namespace {

constexpr int kLayerWarps = 16;      // warps of a block that processes a whole layer
constexpr int kLayerThreads = 32 * kLayerWarps;
constexpr int64_t kSmall = 1 << 12;  // in layers up to this size all entries are candidates
constexpr int kTable = 40;           // number of layers that fit into the parameters of a kernel

// Shared memory of a block that processes a layer.
struct Shared {
  int64_t sums[kLayerWarps];
  int64_t position, rank;
  int64_t threshold, tie;
  unsigned tail;  // bits of a packed mask after its last complete word
  unsigned bins[kBins];
};

// A layer, as passed from the host.
struct Entry {
  TopkLayer layer;
  int64_t first_tile, sample;  // sample: size of the sample
  void* candidates;
};
struct Table {
  Entry entries[kTable];
};
static_assert(sizeof(Table) + sizeof(Workspace) + sizeof(int) <= 4096);

struct Interval {
  int64_t low, high;
  int64_t count;  // number of values in it
  __device__ bool holds(int64_t x) const { return low <= x && x <= high; }
};

// The shift that distributes values 0 ... range over the bins.
__device__ int bin_shift(int64_t range) { return max(0, 64 - __clzll(range) - 11); }

// The first position in [begin, end) where the running sum of count(position) reaches the rank. The rank is reduced to
// the rank within that position. Returns begin if the sum never reaches the rank.
template <class CountAt>
__device__ int64_t reach(int64_t begin, int64_t end, int64_t& rank, Shared& shared, const CountAt& count) {
  for (;;) {
    const int64_t share = (end - begin + kLayerThreads - 1) / kLayerThreads;
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
template <class Bins>
__device__ Interval narrowed(int64_t low, int64_t high, int64_t& rank, Shared& shared, const Bins* bins) {
  const int shift = bin_shift(high - low);
  const int64_t bin =
      kBins - 1 - reach(0, kBins, rank, shared, [=](int64_t i) { return static_cast<int64_t>(bins[kBins - 1 - i]); });
  const int64_t first = low + (bin << shift);
  return {first, min(high, first + ((int64_t{1} << shift) - 1)), static_cast<int64_t>(bins[bin])};
}

// An interval that contains, of value(i) for i < count, only the value of the given rank, or only values that are equal
// to it. The rank is reduced to the rank within the interval. Values are in [0, range]; negative ones are left out.
template <class Value>
__device__ Interval pick(int64_t count, int64_t range, int64_t& rank, Shared& shared, const Value& value) {
  Interval in{0, range, count};
  do {
    const uint64_t width = in.high - in.low;
    const int shift = bin_shift(in.high - in.low);
    for (int i = threadIdx.x; i < kBins; i += kLayerThreads) shared.bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kLayerThreads) {
      const uint64_t offset = static_cast<uint64_t>(value(i)) - static_cast<uint64_t>(in.low);
      if (offset <= width) atomicAdd(&shared.bins[offset >> shift], 1u);
    }
    __syncthreads();
    in = narrowed(in.low, in.high, rank, shared, shared.bins);
    __syncthreads();
  } while (in.low < in.high && in.count > 1);
  return in;
}

// The bracket from a sample: order statistics four standard deviations around the expected rank. It misses the k-th
// largest in about one layer of ten thousand. The size n^(2/3) balances the costs of the sample and of the candidates.
template <class S>
__device__ Interval sampled(const Entry& entry, Shared& shared) {
  const TopkLayer& layer = entry.layer;
  const int64_t size = entry.sample, stride = layer.n / size;
  S* const drawn = static_cast<S*>(entry.candidates);
  for (int64_t i = threadIdx.x; i < size; i += kLayerThreads) {
    uint64_t random = (i + 1) * 0x9e3779b97f4a7c15ull;  // random position in each stride, in case of periodic scores
    random = (random ^ random >> 32) * 0xd6e8feb86659fd93ull >> 32;
    drawn[i] = static_cast<S>(magnitude<S>(layer, i * stride + static_cast<int64_t>(random * stride >> 32)));
  }
  __syncthreads();
  const double share = static_cast<double>(layer.k) / static_cast<double>(layer.n);
  const double rank = share * static_cast<double>(size), margin = 4 * sqrt(rank * (1 - share)) + 4;
  auto top = static_cast<int64_t>(rank - margin), bottom = static_cast<int64_t>(rank + margin);
  const auto value = [=](int64_t i) { return static_cast<int64_t>(drawn[i]); };
  Interval bracket{0, kMagnitude<S>, 0};
  if (bottom <= size) bracket.low = pick(size, kMagnitude<S>, bottom, shared, value).low;
  if (top >= 1) bracket.high = pick(size, kMagnitude<S>, top, shared, value).high;
  return bracket;
}

__device__ bool usable(const int64_t* hint, int64_t infinity) {
  return hint && 0 <= hint[0] && hint[0] <= hint[1] && hint[1] <= infinity;
}

__host__ __device__ int64_t capacity(int64_t n) { return min(n, max(n / 16, int64_t{1} << 14)); }

// Initializes a layer with its first bracket. One block per layer of the table; `first` is the number of its first
// layer.
template <class S>
__global__ void __launch_bounds__(kLayerThreads)
    begin(const __grid_constant__ Table table, Workspace space, int first) {
  __shared__ Shared shared;
  const Entry& entry = table.entries[blockIdx.x];
  const TopkLayer& layer = entry.layer;
  const int number = first + static_cast<int>(blockIdx.x);
  Interval bracket{0, kMagnitude<S>, 0};
  if (layer.k == 0) bracket.low = kMagnitude<S>;
  else if (layer.n > kSmall) {
    const bool hinted = usable(layer.hint, space.infinity) && layer.hint[0] < layer.hint[1];
    bracket = hinted ? Interval{layer.hint[0], layer.hint[1], 0} : sampled<S>(entry, shared);
  }
  if (threadIdx.x != 0) return;
  if (number == 0) *space.missed = *space.tied = 0;
  Work& w = space.works[number];
  w.layer = layer;
  w.first_tile = entry.first_tile;
  w.aligned = (reinterpret_cast<uintptr_t>(layer.scores) | reinterpret_cast<uintptr_t>(layer.mask)) % 16 == 0;
  w.phase = Phase::scan;
  w.lo = bracket.low, w.hi = bracket.high;
  w.above = w.inside = 0;
  w.candidates = entry.candidates;
  w.capacity = capacity(layer.n);
  w.ties = space.ties + entry.first_tile * kWarps;
  w.bins = space.bins + static_cast<int64_t>(number) * kBins;
}

template <class S>
__global__ void __launch_bounds__(kThreads, 4) scan(Workspace space, const unsigned* needed) {
  if (needed == nullptr || *needed > 0) scan_layers<S>(space, Stored<S>{});
}

// Sets a bracket that surely contains the k-th largest, with `above` entries above it. Called by one thread.
__device__ void aim(Work& w, const Interval& bracket, int64_t above) {
  const bool good = bracket.count <= w.capacity || bracket.low == bracket.high;
  w.phase = good ? Phase::scan : Phase::narrow;
  w.lo = bracket.low, w.hi = bracket.high;
  w.above = good ? 0 : above;
  w.inside = 0;
}

// Writes the selection and the hint for the next call. crowd: entries per value of the bits, near the threshold.
__device__ void finish(Work& w, int64_t threshold, int64_t tie, double crowd, int64_t infinity) {
  const TopkLayer& layer = w.layer;
  w.phase = Phase::nothing;
  layer.selection[0] = threshold, layer.selection[1] = tie;
  int64_t low = layer.k > 0 ? threshold : 0, high = low;  // no bracket yet, only the threshold
  if (layer.k > 0 && layer.n > kSmall && usable(layer.hint, infinity)) {
    // Scores change little between steps. The next bracket extends four times as far as the threshold moved this time,
    // and it shrinks slowly. If it would hold too many candidates, a new sample in every call is cheaper.
    const double last_low = static_cast<double>(layer.hint[0]), last_high = static_cast<double>(layer.hint[1]);
    const double n = static_cast<double>(layer.n);
    const double moved = fabs(static_cast<double>(threshold) - (last_low + last_high) / 2);
    const double half = max(max(4 * moved, (last_high - last_low) * 3 / 8), max(n / 2048 / crowd, 1.0));
    if (2 * half * crowd <= n / 128) {
      const auto distance = static_cast<int64_t>(min(half, 0x1p62));
      low = threshold - min(distance, threshold), high = threshold + min(distance, infinity - threshold);
    }
  }
  if (layer.hint) layer.hint[0] = low, layer.hint[1] = high;
}

// Sets the mask of a candidate. In a packed mask its bit is still 0. Bits after the last complete word are collected in
// shared.tail.
__device__ void mark(const TopkLayer& layer, int64_t i, bool kept, Shared& shared) {
  if (!layer.packed) {
    layer.mask[i] = kept;
  } else if (kept) {
    unsigned* const word = i < layer.n / 32 * 32 ? reinterpret_cast<unsigned*>(layer.mask) + i / 32 : &shared.tail;
    atomicOr(word, 1u << i % 32);
  }
}

// After a pass: selects the k-th largest among the candidates and sets their mask bytes, or sets another bracket.
template <class S>
__global__ void __launch_bounds__(kLayerThreads) settle(Workspace space, const unsigned* needed) {
  __shared__ Shared shared;
  if (needed != nullptr && *needed == 0) return;
  Work& w = space.works[blockIdx.x];
  if (w.phase != Phase::scan) return;
  const TopkLayer& layer = w.layer;
  const int64_t n = layer.n, lo = w.lo, hi = w.hi;
  const int64_t above = w.above, inside = w.inside;
  int64_t rank = layer.k - above;  // rank of the k-th among the entries inside; 1 is the largest
  __syncthreads();  // one thread changes these values below
  if (layer.k == 0) {
    if (threadIdx.x == 0) finish(w, kMagnitude<int64_t>, -1, 0, space.infinity);
    return;
  }
  const bool hit = 1 <= rank && rank <= inside;
  if (hit && lo == hi) {
    const int64_t strip =
        reach(0, (n + kStrip<S> - 1) / kStrip<S>, rank, shared, [&](int64_t i) { return int64_t{w.ties[i]}; });
    const int64_t begin = strip * kStrip<S>;
    const int64_t tie = reach(begin, min(begin + kStrip<S>, n), rank, shared,
                              [&](int64_t i) { return int64_t{magnitude<S>(layer, i) == lo}; });
    if (threadIdx.x != 0) return;
    finish(w, lo, tie, static_cast<double>(inside), space.infinity);
    if (layer.mask == nullptr) return;
    w.phase = Phase::paint;
    atomicAdd(space.tied, 1u);
  } else if (hit && inside <= w.capacity) {
    const auto* candidates = static_cast<const Candidate<S>*>(w.candidates);
    const auto offset = [=](int64_t i) { return magnitude_of(candidates[i]) - lo; };
    const auto from_end = [=](int64_t i) { return n - 1 - index_of(candidates[i]); };  // ties go to the smaller index
    if (threadIdx.x == 0) shared.tail = 0;
    const Interval last = pick(inside, hi - lo, rank, shared, offset);
    Interval at{0, n - 1, 1};
    if (last.count > 1)
      at = pick(inside, n - 1, rank, shared, [=](int64_t i) { return offset(i) == last.low ? from_end(i) : -1; });
    for (int64_t i = threadIdx.x; i < inside; i += kLayerThreads) {
      const bool equal = last.holds(offset(i));
      if (layer.mask)
        mark(layer, index_of(candidates[i]), offset(i) > last.high || (equal && from_end(i) >= at.low), shared);
      if (equal && at.holds(from_end(i))) shared.threshold = offset(i) + lo, shared.tie = index_of(candidates[i]);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (layer.mask && layer.packed)
      for (int64_t i = n / 32 * 32; i < n; i += 8) layer.mask[i / 8] |= static_cast<uint8_t>(shared.tail >> i % 32);
    const double t = static_cast<double>(shared.threshold);
    const double crowd_above = static_cast<double>(layer.k - above) / (static_cast<double>(hi) - t + 1);
    const double crowd_below = static_cast<double>(inside - (layer.k - above) + 1) / (t - static_cast<double>(lo) + 1);
    finish(w, shared.threshold, shared.tie, max(crowd_above, crowd_below), space.infinity);
  } else {
    for (int i = threadIdx.x; i < kBins; i += kLayerThreads) w.bins[i] = 0;
    if (threadIdx.x != 0) return;
    atomicAdd(space.missed, 1u);
    if (rank < 1) aim(w, {hi + 1, kMagnitude<S>, above}, 0);
    else if (rank > inside) aim(w, {0, lo - 1, n - above - inside}, above + inside);
    else aim(w, {lo, hi, inside}, above);
  }
}

// Computes the histogram of the magnitudes in the bracket, for each layer that waits for it.
template <class S>
__global__ void __launch_bounds__(kThreads) histogram(Workspace space) {
  __shared__ unsigned bins[kBins];  // a block processes fewer than 2^32 entries
  if (*space.missed == 0) return;
  for_each_layer(space, [&](int number, int64_t tile, int64_t end) {
    const Work& w = space.works[number];
    if (w.phase != Phase::narrow) return;
    const uint64_t lo = w.lo, range = w.hi - w.lo;
    const int shift = bin_shift(w.hi - w.lo);
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (; tile < end; ++tile) {
      const int64_t strip = tile * kWarps + warp();
      const bool whole = w.aligned && (strip + 1) * kStrip<S> <= w.layer.n;
      S magnitudes[kVectors<S>][kWidth<S>];
#pragma unroll
      for (int v = 0; v < kVectors<S>; ++v) Stored<S>{}(w, number, place<S>(strip, v), whole, magnitudes[v]);
#pragma unroll
      for (int v = 0; v < kVectors<S>; ++v)
        for (const S m : magnitudes[v])
          if (const uint64_t offset = static_cast<uint64_t>(int64_t{m}) - lo; offset <= range)
            atomicAdd(&bins[offset >> shift], 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads)
      if (bins[i] > 0) atomicAdd(&w.bins[i], static_cast<Count>(bins[i]));
  });
}

// After a histogram: narrows the bracket of each layer that waits for it.
__global__ void __launch_bounds__(kLayerThreads) narrow(Workspace space) {
  __shared__ Shared shared;
  Work& w = space.works[blockIdx.x];
  if (*space.missed == 0 || w.phase != Phase::narrow) return;
  const int64_t k = w.layer.k;
  int64_t rank = k - static_cast<int64_t>(w.above);
  const Interval bracket = narrowed(w.lo, w.hi, rank, shared, w.bins);
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kLayerThreads) w.bins[i] = 0;
  if (threadIdx.x == 0) aim(w, bracket, k - rank);
}

// Sets the mask of entries that equal the threshold. Their mask bytes are 2; for a packed mask the scores are read
// again.
template <class S>
__global__ void __launch_bounds__(kThreads) paint(Workspace space) {
  if (*space.tied == 0) return;
  for_each_layer(space, [&](int number, int64_t tile, int64_t end) {
    const Work& w = space.works[number];
    if (w.phase != Phase::paint) return;
    const int64_t tie = w.layer.selection[1];
    uint8_t* const mask = w.layer.mask;
    for (; tile < end; ++tile) {
      const int64_t strip = tile * kWarps + warp(), begin = strip * kStrip<S>;
      const int64_t last = min(begin + kStrip<S>, w.layer.n);
      if (begin >= last || w.ties[strip] == 0) continue;
      if (w.layer.packed) {
        for (int v = 0; v < kVectors<S>; ++v) {
          const int64_t i = place<S>(strip, v);
          unsigned bits = 0;
          for (int j = 0; j < kWidth<S> && i + j < last; ++j) {
            const int64_t m = magnitude<S>(w.layer, i + j);
            bits |= static_cast<unsigned>(m > w.hi || (m == w.hi && i + j <= tie)) << j;
          }
          store_bits<S>(mask, i, last, bits);
        }
        continue;
      }
      for (int64_t i = begin + lane(); i < last; i += 32)
        if (mask[i] == 2) mask[i] = i <= tie;
    }
  });
}

// Allocates consecutive parts of a memory block, each aligned to vectors.
class Parts {
 public:
  explicit Parts(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* take(int64_t count, size_t size) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * size + 15) / 16 * 16;
    return memory_ ? memory_ + at : nullptr;
  }
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take(count, sizeof(T)));
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

// Calls f with a value of the integer type that holds the bits of the dtype.
template <class F>
decltype(auto) with_bits(Float dtype, F&& f) {
  switch (dtype) {
    case Float::float32: return f(int32_t{});
    case Float::float64: return f(int64_t{});
    default: return f(int16_t{});
  }
}

int64_t infinity(Float dtype) {
  switch (dtype) {
    case Float::float16: return 0x7c00;
    case Float::bfloat16: return 0x7f80;
    case Float::float32: return 0x7f800000;
    default: return 0x7ff0000000000000;
  }
}

struct Plan {
  std::vector<Entry> entries;
  Workspace space{};
  size_t bytes = 0;
};

// Positions in the workspace for layers of one dtype. The workspace may be null, to compute its size.
Plan plan(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace) {
  Plan p;
  const Float dtype = layers[0].dtype;
  const auto [tile, candidate] = with_bits(dtype, [](auto s) {
    return std::pair(kTile<decltype(s)>, sizeof(Candidate<decltype(s)>));
  });
  Parts parts(workspace);
  Workspace& space = p.space;
  space.missed = parts.take<unsigned>(1);
  space.tied = parts.take<unsigned>(1);
  space.works = parts.take<Work>(static_cast<int64_t>(layers.size()));
  space.bins = parts.take<Count>(static_cast<int64_t>(layers.size()) * kBins);
  for (const TopkLayer& layer : layers) {
    const auto root = std::pow(static_cast<double>(layer.n), 2.0 / 3);
    p.entries.push_back({layer, space.tiles, std::max<int64_t>(512, static_cast<int64_t>(root)),
                         parts.take(capacity(layer.n), candidate)});
    space.tiles += (layer.n + tile - 1) / tile;
  }
  space.ties = parts.take<unsigned>(space.tiles * kWarps);
  space.layers = static_cast<int>(layers.size());
  space.infinity = infinity(dtype);
  space.nan_flag = nan_flag;
  p.bytes = parts.bytes();
  return p;
}

// The layers, grouped by dtype.
std::vector<std::vector<TopkLayer>> by_dtype(const std::vector<TopkLayer>& layers) {
  std::vector<std::vector<TopkLayer>> groups;
  for (const Float dtype : {Float::float16, Float::bfloat16, Float::float32, Float::float64}) {
    std::vector<TopkLayer> same;
    std::copy_if(layers.begin(), layers.end(), std::back_inserter(same), [=](auto& l) { return l.dtype == dtype; });
    if (!same.empty()) groups.push_back(std::move(same));
  }
  return groups;
}

}  // namespace

cudaError_t topk_begin(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace, cudaStream_t stream,
                       Workspace& space) {
  const Plan p = plan(layers, nan_flag, workspace);
  space = p.space;
  for (int first = 0; first < space.layers; first += kTable) {
    Table table{};
    const int count = std::min(kTable, space.layers - first);
    std::copy_n(p.entries.begin() + first, count, table.entries);
    EXSSNET_TRY(with_bits(layers[0].dtype, [&](auto s) {
      return EXSSNET_LAUNCH(begin<decltype(s)>, count, kLayerThreads, 0, stream, table, space, first);
    }));
  }
  return cudaSuccess;
}

cudaError_t topk_finish(const Workspace& space, Float dtype, int processors, cudaStream_t stream) {
  return with_bits(dtype, [&](auto s) -> cudaError_t {
    using S = decltype(s);
    const unsigned* const always = nullptr;
    const unsigned blocks = pass_blocks(space, processors);
    EXSSNET_TRY(EXSSNET_LAUNCH(settle<S>, space.layers, kLayerThreads, 0, stream, space, always));
    for (int bits = 8 * sizeof(S) - 1; bits > 0; bits -= 11) {
      EXSSNET_TRY(EXSSNET_LAUNCH(histogram<S>, blocks, kThreads, 0, stream, space));
      EXSSNET_TRY(EXSSNET_LAUNCH(narrow, space.layers, kLayerThreads, 0, stream, space));
    }
    EXSSNET_TRY(EXSSNET_LAUNCH(scan<S>, blocks, kThreads, 0, stream, space, space.missed));
    EXSSNET_TRY(EXSSNET_LAUNCH(settle<S>, space.layers, kLayerThreads, 0, stream, space, space.missed));
    return EXSSNET_LAUNCH(paint<S>, blocks, kThreads, 0, stream, space);
  });
}

size_t topk_workspace_bytes(const std::vector<TopkLayer>& layers) {
  size_t bytes = 0;
  for (const auto& same : by_dtype(layers)) bytes = std::max(bytes, plan(same, nullptr, nullptr).bytes);
  return bytes;
}

cudaError_t topk_masks(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace, int processors,
                       cudaStream_t stream) {
  for (const auto& same : by_dtype(layers)) {
    Workspace space;
    EXSSNET_TRY(topk_begin(same, nan_flag, workspace, stream, space));
    EXSSNET_TRY(with_bits(same[0].dtype, [&](auto s) {
      const unsigned* const always = nullptr;
      return EXSSNET_LAUNCH(scan<decltype(s)>, pass_blocks(space, processors), kThreads, 0, stream, space, always);
    }));
    EXSSNET_TRY(topk_finish(space, same[0].dtype, processors, stream));
  }
  return cudaSuccess;
}

}  // namespace exssnet::cuda
