#include "cpu/weights.h"

#include <algorithm>
#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {

constexpr int64_t kBlock = kMaskBlock;
constexpr int64_t kGrain = 32;  // blocks per thread, at least

#define EXSSNET_BODY "cpu/weights_body.h"
#include "cpu/each_isa.h"

// Calls body(layer, begin, size) for blocks of all layers.
template <class Layer, class Body>
void for_blocks(const std::vector<Layer>& layers, Body&& body) {
  std::vector<int64_t> first{0};  // block of each layer
  for (const Layer& layer : layers) first.push_back(first.back() + (layer.n + kBlock - 1) / kBlock);
  parallel_for(first.back(), kGrain, [&](int64_t block, int64_t last) {
    auto layer = std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1;
    for (; block < last; ++block) {
      while (block >= first[layer + 1]) ++layer;
      const int64_t begin = (block - first[layer]) * kBlock;
      body(layers[layer], begin, std::min(kBlock, layers[layer].n - begin));
    }
  });
}

template <class F>
void with_types(Float a, Float b, F&& f) {
  with_type(a, [&]<class A>(A* of_a) { with_type(b, [&]<class B>(B* of_b) { f(of_a, of_b); }); });
}

template <class T>
const T* at(const ConstFloats& t, int64_t begin) {
  return static_cast<const T*>(t.data) + begin;
}
template <class T>
T* at(const Floats& t, int64_t begin) {
  return static_cast<T*>(t.data) + begin;
}

// The entries [begin, begin + n) of a weight (O, C, T), run by run of those that follow each other in the order
// (O, T, C). Calls move(place of the run, index of its first entry in the block, number of entries). From entry to
// entry the index rises by T.
template <class Move>
void for_runs(const Order& order, int64_t begin, int64_t n, Move&& move) {
  const int64_t channels = order.channels, taps = order.taps, row = channels * taps, end = begin + n;
  for (int64_t base = begin / row * row; base < end; base += row)
    for (int64_t t = 0; t < taps; ++t) {
      const auto channel_from = [&](int64_t entry) {
        return std::clamp<int64_t>((entry - base - t + taps - 1) / taps, 0, channels);
      };
      const int64_t from = channel_from(std::max(begin, base + t)), to = channel_from(std::max(end, base + t));
      if (from < to) move(base + t * channels + from, base + from * taps + t - begin, to - from);
    }
}

void mask_block(const MaskedWeight& layer, int64_t begin, int64_t n) {
  uint8_t kept_here[kBlock];
  const uint8_t* kept = mask_bytes(layer.mask, begin, n, kept_here);
  with_types(layer.weight.type, layer.masked.type, [&]<class W, class T>(W*, T*) {
    T block[kBlock];
    const int64_t taps = layer.order.taps;
    EXSSNET_PICK(where<W, T>)(at<W>(layer.weight, begin), kept, n, taps == 1 ? at<T>(layer.masked, begin) : block);
    if (taps > 1)
      for_runs(layer.order, begin, n, [&](int64_t place, int64_t index, int64_t count) {
        T* to = at<T>(layer.masked, place);
        for (int64_t i = 0; i < count; ++i) to[i] = block[index + i * taps];
      });
  });
}

// Entries [begin, begin + n) in the order of a contiguous tensor, as C.
template <class C>
void load(const ConstFloats& t, const Order& order, int64_t begin, int64_t n, C* to) {
  with_type(t.type, [&]<class F>(F*) {
    if (order.taps == 1) return EXSSNET_PICK(convert<F, C>)(at<F>(t, begin), n, to);
    F block[kBlock];
    for_runs(order, begin, n, [&](int64_t place, int64_t index, int64_t count) {
      const F* from = at<F>(t, place);
      for (int64_t i = 0; i < count; ++i) block[index + i * order.taps] = from[i];
    });
    EXSSNET_PICK(convert<F, C>)(block, n, to);
  });
}

template <class C>
void gradient_block(const MaskedGradient& layer, int64_t begin, int64_t n) {
  C grad[kBlock];
  load(layer.grad, layer.order, begin, n, grad);
  if (layer.grad_scores.data) {
    C weight[kBlock], product[kBlock];
    float signs[kBlock];
    load(layer.weight, {}, begin, n, weight);
    with_type(layer.scores.type, [&]<class S>(S*) { EXSSNET_PICK(signs<S>)(at<S>(layer.scores, begin), n, signs); });
    EXSSNET_PICK(products<C>)(grad, weight, signs, n, product);
    with_type(layer.grad_scores.type,
              [&]<class S>(S*) { EXSSNET_PICK(convert<C, S>)(product, n, at<S>(layer.grad_scores, begin)); });
  }
  if (layer.grad_weight.data) {
    uint8_t kept_here[kBlock];
    const uint8_t* kept = mask_bytes(layer.mask, begin, n, kept_here);
    with_type(layer.grad_weight.type,
              [&]<class W>(W*) { EXSSNET_PICK(where<C, W>)(grad, kept, n, at<W>(layer.grad_weight, begin)); });
  }
}

// Calls block(layer, places, begin, n, F*, T*) for each block whose places are inside. Returns whether all are.
template <class Block>
bool placed(const std::vector<PlacedValues>& layers, const Block& block) {
  std::atomic<bool> inside = true;
  for_blocks(layers, [&](const PlacedValues& layer, int64_t begin, int64_t n) {
    const int32_t* places = layer.places + begin;
    if (EXSSNET_PICK(largest)(places, n) >= layer.size) inside = false;
    else
      with_types(layer.from.type, layer.to.type,
                 [&](auto* from, auto* to) { block(layer, places, begin, n, from, to); });
  });
  return inside;
}

}  // namespace

void masked_weights(const std::vector<MaskedWeight>& layers) { for_blocks(layers, mask_block); }

void masked_gradients(const std::vector<MaskedGradient>& layers) {
  for_blocks(layers, [](const MaskedGradient& layer, int64_t begin, int64_t n) {
    const bool wide = layer.grad.type == Float::float64 || layer.weight.type == Float::float64;
    (wide ? gradient_block<double> : gradient_block<float>)(layer, begin, n);
  });
}

bool write_values(const std::vector<PlacedValues>& layers) {
  return placed(layers, []<class F, class T>(const PlacedValues& layer, const int32_t* places, int64_t begin, int64_t n,
                                             F*, T*) {
    T block[kBlock];
    EXSSNET_PICK(convert<F, T>)(at<F>(layer.from, begin), n, block);
    for (int64_t i = 0; i < n; ++i) *at<T>(layer.to, places[i]) = block[i];
  });
}

bool gather_values(const std::vector<PlacedValues>& layers) {
  return placed(layers, []<class F, class T>(const PlacedValues& layer, const int32_t* places, int64_t begin, int64_t n,
                                             F*, T*) {
    F block[kBlock];
    for (int64_t i = 0; i < n; ++i) block[i] = *at<F>(layer.from, places[i]);
    EXSSNET_PICK(convert<F, T>)(block, n, at<T>(layer.to, begin));
  });
}

}  // namespace exssnet::cpu
