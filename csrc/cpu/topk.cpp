#include "cpu/topk.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

// How it works. A layer has a bracket [lo, hi] of magnitude bits that almost surely contains the k-th largest
// magnitude. It comes from the hint of the last call, or from a sample of the scores. One pass over the scores counts
// the entries above the bracket, writes the mask as if no other entries were kept, and collects the candidates inside.
// The k-th largest is then selected among these few candidates, and their mask bytes are set. If the bracket does not
// contain the k-th largest, histograms of the bits give a bracket that does, and the pass is repeated.

namespace exssnet::cpu {

namespace {

constexpr int64_t kChunk = 1 << 14;  // entries scanned at a time
constexpr int64_t kGrain = 1 << 15;  // entries per thread, at least
constexpr int64_t kSmall = 1 << 12;  // in layers up to this size all entries are candidates
constexpr int kBins = 1 << 11;       // of the histograms

struct ScanCounts {
  int64_t above, inside, largest;
};

#define EXSSNET_BODY "cpu/topk_scan.h"
#include "cpu/each_isa.h"

// Calls body(0) ... body(count - 1). A thread that has finished one call takes the next.
template <class Body>
void for_each(int64_t count, int64_t workers, Body&& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(count, workers), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

// A candidate, in the order of the selection: larger magnitudes first, ties by smaller index.
struct WideKey {
  uint64_t high, low;
  auto operator<=>(const WideKey&) const = default;
};
constexpr uint64_t kIndices = (1ull << 33) - 1;  // 31 bits of magnitude above 33 bits of index

template <class B>
auto make_key(B bits, int64_t index) {
  if constexpr (sizeof(B) == 8) return WideKey{static_cast<uint64_t>(bits), kIndices - index};
  else return static_cast<uint64_t>(bits) << 33 | (kIndices - index);
}
int64_t bits_of(uint64_t key) { return static_cast<int64_t>(key >> 33); }
int64_t bits_of(const WideKey& key) { return static_cast<int64_t>(key.high); }
int64_t index_of(uint64_t key) { return static_cast<int64_t>(kIndices - (key & kIndices)); }
int64_t index_of(const WideKey& key) { return static_cast<int64_t>(kIndices - key.low); }
uint64_t leading(uint64_t key) { return key; }
uint64_t leading(const WideKey& key) { return key.high; }

// The shift that distributes values 0 ... range over the bins.
int bin_shift(uint64_t range) { return std::max(0, static_cast<int>(std::bit_width(range)) - 11); }

// The key of the given rank. Rank 1 is the largest.
template <class Key>
Key pick(const Key* keys, int64_t count, int64_t rank) {
  std::vector<Key> few, fewer;
  while (count > 1024) {
    uint64_t low = leading(keys[0]), high = low;
    for (int64_t i = 0; i < count; ++i) {
      low = std::min(low, leading(keys[i]));
      high = std::max(high, leading(keys[i]));
    }
    const int shift = bin_shift(high - low);
    int64_t bins[kBins] = {};
    for (int64_t i = 0; i < count; ++i) ++bins[(leading(keys[i]) - low) >> shift];
    uint64_t bin = (high - low) >> shift;
    while (rank > bins[bin]) rank -= bins[bin--];
    if (bins[bin] == count) break;
    fewer.clear();
    for (int64_t i = 0; i < count; ++i)
      if ((leading(keys[i]) - low) >> shift == bin) fewer.push_back(keys[i]);
    few.swap(fewer);
    keys = few.data();
    count = static_cast<int64_t>(few.size());
  }
  if (keys != few.data()) few.assign(keys, keys + count);
  std::nth_element(few.begin(), few.begin() + (rank - 1), few.end(), std::greater<>());
  return few[rank - 1];
}

class Layer {
 public:
  explicit Layer(const TopkLayer& layer) : in(layer), counts((layer.n + kChunk - 1) / kChunk) {}
  virtual ~Layer() = default;
  virtual void guess() = 0;               // sets the first bracket
  virtual void scan(int64_t chunk) = 0;   // one chunk of the pass
  virtual int64_t first_nan() const = 0;  // index, or -1, after the first pass
  virtual bool settle() = 0;              // after the pass: writes the selection, or sets another bracket
  virtual void narrow() = 0;              // narrows the bracket, unless it is known to be narrow; uses all threads
  virtual void paint(int64_t chunk) = 0;  // sets the mask where entries equal the threshold

  const TopkLayer in;
  bool paint_needed = false;

 protected:
  std::vector<ScanCounts> counts;  // counts of each chunk
};

template <class B>
class LayerOf final : public Layer {
 public:
  LayerOf(const TopkLayer& layer, B infinity)
      : Layer(layer), scores_(static_cast<const B*>(layer.scores)), infinity_(infinity), hi_(infinity) {}

  void guess() override {
    if (in.k == 0) lo_ = hi_ = kMax;
    else if (in.n > kSmall) {
      from_hint_ = has_hint() && in.hint[0] < in.hint[1];
      if (from_hint_) lo_ = static_cast<B>(in.hint[0]), hi_ = static_cast<B>(in.hint[1]);
      else sample();
    }
    prepare();
  }

  void scan(int64_t chunk) override {
    const int64_t begin = chunk * kChunk, size = std::min(kChunk, in.n - begin);
    const bool collect = lo_ < hi_;
    uint16_t found[kChunk + 4];
    uint8_t* mask = in.mask ? in.mask + begin : nullptr;
    const ScanCounts c = EXSSNET_PICK(scan<B>)(scores_ + begin, size, lo_, hi_, mask, collect ? found : nullptr);
    counts[chunk] = c;
    if (!collect || c.inside == 0) return;
    const int64_t start = found_.fetch_add(c.inside, std::memory_order_relaxed);
    if (start + c.inside > capacity_) return;  // too many candidates: settle() handles it
    for (int64_t i = 0; i < c.inside; ++i)
      keys_[start + i] = make_key<B>(magnitude(begin + found[i]), begin + found[i]);
  }

  int64_t first_nan() const override {
    for (size_t chunk = 0; chunk < counts.size(); ++chunk)
      if (counts[chunk].largest > infinity_)
        for (int64_t i = chunk * kChunk;; ++i)
          if (magnitude(i) > infinity_) return i;
    return -1;
  }

  bool settle() override {
    int64_t above = 0, inside = 0;
    for (const ScanCounts& c : counts) above += c.above, inside += c.inside;
    const int64_t rank = in.k - above;  // rank of the k-th among the entries inside; 1 is the largest
    if (in.k == 0) return finish(std::numeric_limits<int64_t>::max(), -1, 0);
    if (rank >= 1 && rank <= inside) {
      if (lo_ == hi_) {
        paint_needed = in.mask != nullptr;
        return finish(lo_, tie(rank), static_cast<double>(inside));
      }
      if (inside <= capacity_) {
        const auto last = pick(keys_.get(), inside, rank);
        if (in.mask)
          for (int64_t i = 0; i < inside; ++i) in.mask[index_of(keys_[i])] = keys_[i] >= last;
        const double t = static_cast<double>(bits_of(last));
        const double crowd_above = static_cast<double>(rank) / (static_cast<double>(hi_) - t + 1);
        const double crowd_below = static_cast<double>(inside - rank + 1) / (t - static_cast<double>(lo_) + 1);
        return finish(bits_of(last), index_of(last), std::max(crowd_above, crowd_below));
      }
    }
    if (from_hint_) {
      from_hint_ = false;
      sample();
      prepare();
      known_ = false;
      return false;
    }
    known_ = true;
    above_ = above;
    if (rank < 1) lo_ = hi_ + 1, hi_ = infinity_, above_ = 0;
    else if (rank > inside) hi_ = lo_ - 1, lo_ = 0, above_ += inside;
    return false;
  }

  void narrow() override {
    if (!known_) return;
    int64_t inside;
    do {
      const uint64_t range = static_cast<uint64_t>(hi_ - lo_);
      const int shift = bin_shift(range);
      const int64_t workers = std::min(max_threads(), in.n / kGrain + 1);
      std::vector<int64_t> bins(workers * kBins);
      parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) {
          int64_t* mine = bins.data() + begin * kBins;
          for (int64_t i = in.n * begin / workers; i < in.n * (begin + 1) / workers; ++i) {
            const uint64_t offset = static_cast<uint64_t>(magnitude(i)) - static_cast<uint64_t>(lo_);
            if (offset <= range) ++mine[offset >> shift];
          }
        }
      });
      for (int64_t i = kBins; i < workers * kBins; ++i) bins[i % kBins] += bins[i];
      int64_t bin = static_cast<int64_t>(range >> shift);
      while (above_ + bins[bin] < in.k) above_ += bins[bin--];
      inside = bins[bin];
      const B top = hi_;
      lo_ = static_cast<B>(lo_ + (bin << shift));
      hi_ = static_cast<B>(std::min<int64_t>(top, lo_ + ((int64_t{1} << shift) - 1)));
    } while (inside > capacity_ && lo_ < hi_);
    prepare();
  }

  void paint(int64_t chunk) override {
    // A second pass, up to the tie index, keeps the entries "at least the threshold" instead of "above" it. Beyond the
    // tie index the mask of the first pass is correct.
    const int64_t begin = chunk * kChunk, size = std::min(kChunk, in.selection[1] + 1 - begin);
    if (size > 0 && counts[chunk].inside > 0)
      EXSSNET_PICK(scan<B>)(scores_ + begin, size, kMax, static_cast<B>(lo_ - 1), in.mask + begin, nullptr);
  }

 private:
  static constexpr B kMax = std::numeric_limits<B>::max();
  using Key = decltype(make_key<B>(0, 0));

  B magnitude(int64_t i) const { return scores_[i] & kMax; }

  bool has_hint() const { return in.hint && 0 <= in.hint[0] && in.hint[0] <= in.hint[1] && in.hint[1] <= infinity_; }

  // The bracket from a sample: order statistics four standard deviations around the expected rank. It misses the k-th
  // largest in about one layer of ten thousand. The size n^(2/3) balances the costs of the sample and of the
  // candidates.
  void sample() {
    const auto size = std::max<int64_t>(512, static_cast<int64_t>(std::pow(static_cast<double>(in.n), 2.0 / 3)));
    const int64_t stride = in.n / size;
    std::vector<B> drawn(size);
    uint64_t random = 0;  // random position inside each stride, in case the scores are periodic
    for (int64_t i = 0; i < size; ++i) {
      random = random * 6364136223846793005ull + 1442695040888963407ull;
      drawn[i] = magnitude(i * stride + static_cast<int64_t>((random >> 33) % static_cast<uint64_t>(stride)));
    }
    const double share = static_cast<double>(in.k) / static_cast<double>(in.n);
    const double rank = share * static_cast<double>(size);
    const double margin = 4 * std::sqrt(rank * (1 - share)) + 4;
    const auto top = static_cast<int64_t>(rank - margin), bottom = static_cast<int64_t>(rank + margin);
    hi_ = infinity_, lo_ = 0;
    auto end = drawn.end();
    if (bottom < size) {
      end = drawn.begin() + bottom;
      std::nth_element(drawn.begin(), end, drawn.end(), std::greater<>());
      lo_ = *end;
    }
    if (rank >= margin) {
      std::nth_element(drawn.begin(), drawn.begin() + top, end, std::greater<>());
      hi_ = drawn[top];
    }
    hi_ = std::min(hi_, infinity_), lo_ = std::min(lo_, hi_);  // the sample may hold NaN, which the pass detects
  }

  void prepare() {
    found_ = 0;
    if (lo_ == hi_ || keys_) return;
    capacity_ = in.n <= kSmall ? in.n : std::min(in.n, std::max(in.n / 16, kChunk));
    keys_.reset(new Key[capacity_]);
  }

  // Index of the rank-th entry with the magnitude lo_, in order of indices.
  int64_t tie(int64_t rank) const {
    size_t chunk = 0;
    while (rank > counts[chunk].inside) rank -= counts[chunk++].inside;
    int64_t i = static_cast<int64_t>(chunk) * kChunk;
    while ((rank -= magnitude(i) == lo_) > 0) ++i;
    return i;
  }

  // Writes the selection and the hint for the next call. crowd: entries per value of the bits, near the threshold.
  bool finish(int64_t threshold, int64_t tie_index, double crowd) {
    in.selection[0] = threshold;
    in.selection[1] = tie_index;
    if (!in.hint) return true;
    const bool had_hint = has_hint();
    const double last_low = static_cast<double>(in.hint[0]), last_high = static_cast<double>(in.hint[1]);
    in.hint[0] = in.hint[1] = in.k > 0 ? threshold : 0;  // no bracket yet, only the threshold
    if (in.k == 0 || in.n <= kSmall || !had_hint) return true;
    // Scores change little between steps. The next bracket extends four times as far as the threshold moved this time,
    // and it shrinks slowly. If it would hold too many candidates, a new sample in every call is cheaper.
    const double moved = std::abs(static_cast<double>(threshold) - (last_low + last_high) / 2);
    const double half = std::max({4 * moved, (last_high - last_low) * 3 / 8,
                                  static_cast<double>(in.n) / 16384 / crowd, 1.0});
    if (2 * half * crowd > static_cast<double>(in.n) / 128) return true;
    const auto reach = static_cast<int64_t>(std::min(half, 0x1p62));
    in.hint[0] = threshold - std::min(reach, threshold);
    in.hint[1] = threshold + std::min(reach, infinity_ - threshold);
    return true;
  }

  const B* scores_;
  const B infinity_;
  B lo_ = 0, hi_;           // the bracket, inclusive
  bool from_hint_ = false;
  bool known_ = false;      // the bracket surely contains the k-th, with `above_` entries above it
  int64_t above_ = 0;
  std::unique_ptr<Key[]> keys_;
  int64_t capacity_ = 0;    // capacity of keys_
  std::atomic<int64_t> found_{0};
};

std::unique_ptr<Layer> make_layer(const TopkLayer& layer) {
  switch (layer.dtype) {
    case Float::float16: return std::make_unique<LayerOf<int16_t>>(layer, int16_t{0x7c00});
    case Float::bfloat16: return std::make_unique<LayerOf<int16_t>>(layer, int16_t{0x7f80});
    case Float::float32: return std::make_unique<LayerOf<int32_t>>(layer, 0x7f800000);
    default: return std::make_unique<LayerOf<int64_t>>(layer, 0x7ff0000000000000);
  }
}

struct Chunk {
  Layer* layer;
  int64_t chunk;
};

std::vector<Chunk> chunks_of(const std::vector<Layer*>& layers) {
  std::vector<Chunk> chunks;
  for (Layer* layer : layers)
    for (int64_t c = 0; c * kChunk < layer->in.n; ++c) chunks.push_back({layer, c});
  return chunks;
}

}  // namespace

Place topk_masks(const std::vector<TopkLayer>& layers) {
  std::vector<std::unique_ptr<Layer>> owned;
  std::vector<Layer*> pending, painted;
  int64_t total = 0;
  for (const TopkLayer& layer : layers) {
    owned.push_back(make_layer(layer));
    pending.push_back(owned.back().get());
    total += layer.n;
  }
  const int64_t workers = std::min(max_threads(), total / kGrain + 1);
  for_each(pending.size(), workers, [&](int64_t i) { pending[i]->guess(); });
  for (bool first = true; !pending.empty(); first = false) {
    const std::vector<Chunk> chunks = chunks_of(pending);
    for_each(chunks.size(), workers, [&](int64_t i) { chunks[i].layer->scan(chunks[i].chunk); });
    if (first)
      for (size_t i = 0; i < pending.size(); ++i)
        if (const int64_t index = pending[i]->first_nan(); index >= 0) return {static_cast<int64_t>(i), index};
    std::vector<uint8_t> settled(pending.size());
    for_each(pending.size(), workers, [&](int64_t i) { settled[i] = pending[i]->settle(); });
    std::vector<Layer*> missed;
    for (size_t i = 0; i < pending.size(); ++i) {
      if (!settled[i]) missed.push_back(pending[i]);
      else if (pending[i]->paint_needed) painted.push_back(pending[i]);
    }
    for (Layer* layer : missed) layer->narrow();
    pending.swap(missed);
  }
  const std::vector<Chunk> chunks = chunks_of(painted);
  for_each(chunks.size(), workers, [&](int64_t i) { chunks[i].layer->paint(chunks[i].chunk); });
  return {-1, -1};
}

}  // namespace exssnet::cpu
