#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "cuda/topk_settle.h"

// How it works. A layer has a bracket [lo, hi] of magnitude bits that almost surely contains the k-th largest
// magnitude. It comes from the hint of the last call, or from a sample of the scores. One pass over the scores
// (topk_pass.h) counts the entries above the bracket, writes the mask as if no other entries were kept, and collects
// the candidates inside with their histogram. The last block to finish a layer then selects the k-th largest among
// these few candidates and keeps those up to it (topk_settle.h). If the bracket does not contain the k-th largest, it
// sets another one, and the pass is repeated in the next launch. If that misses too, the last block alone narrows the
// bracket by histograms of the bits until it holds. All layers share the same launches. The order of the candidates is
// arbitrary and does not affect the selection.

namespace exssnet::cuda {

namespace {

constexpr int kLayerThreads = 32 * kMostWarps;  // of a block that begins a layer
constexpr int kTable = 40;                      // number of layers that fit into the parameters of a kernel

struct Table {
  Entry entries[kTable];
};
static_assert(sizeof(Table) + sizeof(Workspace) + sizeof(int) <= 4096);

// One block per layer of the table; `first` is the number of its first layer.
template <class S>
__global__ void __launch_bounds__(kLayerThreads)
    begin(const __grid_constant__ Table table, Workspace space, int first) {
  __shared__ Shared<S> shared;
  begin_layer(table.entries[blockIdx.x], space, first + static_cast<int>(blockIdx.x), shared);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 3) scan(Workspace space) {
  scan_layers<S>(space, Stored<S>{});
}

// For layers that scan() did not finish: the mask of equal entries, or a second pass. The last block of a layer does
// what remains alone; that is very rare.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) rescue(Workspace space) {
  __shared__ Shared<S> shared;
  if (*space.missed + *space.tied == 0) return;
  for_each_layer(space, [&](int number, int64_t tile, int64_t end) {
    Work& w = space.works[number];
    const Phase phase = w.phase;
    if (phase == Phase::nothing) return;
    if (phase == Phase::paint) return paint<S>(w, tile, end);
    if (phase == Phase::scan) scan_tiles<S>(space, number, tile, end, Stored<S>{}, shared.found);
    if (!is_last(w, end - tile, shared.last)) return;
    if (phase == Phase::scan) settle(w, space.infinity, shared);
    for (Phase next; (next = w.phase) != Phase::nothing;) {
      __syncthreads();  // one thread changes the phase
      if (next == Phase::narrow) {
        narrow(w, shared);
      } else if (next == Phase::scan) {
        scan_tiles<S>(space, number, 0, w.tiles, Stored<S>{}, shared.found);
        __syncthreads();
        settle(w, space.infinity, shared);
      } else {
        paint<S>(w, 0, w.tiles);
        return;
      }
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

Plan topk_plan(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace) {
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

cudaError_t topk_rescue(const Workspace& space, Float dtype, int processors, cudaStream_t stream) {
  return with_bits(dtype, [&](auto s) {
    return EXSSNET_LAUNCH(rescue<decltype(s)>, pass_blocks(space, processors), kThreads, 0, stream, space);
  });
}

size_t topk_workspace_bytes(const std::vector<TopkLayer>& layers) {
  size_t bytes = 0;
  for (const auto& same : by_dtype(layers)) bytes = std::max(bytes, topk_plan(same, nullptr, nullptr).bytes);
  return bytes;
}

cudaError_t topk_masks(const std::vector<TopkLayer>& layers, int32_t* nan_flag, void* workspace, int processors,
                       cudaStream_t stream) {
  for (const auto& same : by_dtype(layers)) {
    const Plan p = topk_plan(same, nan_flag, workspace);
    EXSSNET_TRY(with_bits(same[0].dtype, [&](auto s) -> cudaError_t {
      using S = decltype(s);
      for (int first = 0; first < p.space.layers; first += kTable) {
        Table table{};
        const int count = std::min(kTable, p.space.layers - first);
        std::copy_n(p.entries.begin() + first, count, table.entries);
        EXSSNET_TRY(EXSSNET_LAUNCH(begin<S>, count, kLayerThreads, 0, stream, table, p.space, first));
      }
      return EXSSNET_LAUNCH(scan<S>, pass_blocks(p.space, processors), kThreads, 0, stream, p.space);
    }));
    EXSSNET_TRY(topk_rescue(p.space, same[0].dtype, processors, stream));
  }
  return cudaSuccess;
}

}  // namespace exssnet::cuda
