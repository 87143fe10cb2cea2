// Body of the loops over one block of dense weights. It is compiled per instruction set (see dispatch.h), includes
// nothing.

template <class F, class T>
static void convert(const F* __restrict from, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) store(value(from[i]), to[i]);
}

// to[i] = from[i] where kept[i] is 1, 0 where it is 0.
template <class F, class T>
static void where(const F* __restrict from, const uint8_t* __restrict kept, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) store(kept[i] ? value(from[i]) : 0, to[i]);
}

template <class S>
static void signs(const S* __restrict scores, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = sign(scores[i]);
}

// to[i] = a[i] * b[i] * signs[i]
template <class C>
static void products(const C* __restrict a, const C* __restrict b, const float* __restrict signs, int64_t n,
                     C* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = a[i] * b[i] * static_cast<C>(signs[i]);
}

// The largest place. Negative places count as large ones.
static uint32_t largest(const int32_t* __restrict places, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, static_cast<uint32_t>(places[i]));
  return most;
}
