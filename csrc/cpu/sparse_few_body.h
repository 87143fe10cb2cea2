// The loops over rows of cpu/sparse_few.cpp, compiled once per instruction set (see dispatch.h).

#include "cpu/sparse_rows_body.h"

// Whether the loops gather with masks, 8 floats at a time: 16 are no faster, and leave more lanes idle.
template <class T>
constexpr bool gathers_with_masks = EXSSNET_X86 && kVectorBytes == 64 && sizeof(T) == sizeof(float);

// x[index[i]] for as many i as a register has lanes.
template <class T>
typename Vector<T>::type gather(const T* x, const int32_t* index) {
#if EXSSNET_X86
  if constexpr (kVectorBytes == 64 && sizeof(T) == 8)  // without a mask, GCC warns of memory that is not set
    return _mm512_mask_i32gather_pd(_mm512_setzero_pd(), 0xff,
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), x, 8);
  else if constexpr (kVectorBytes == 32 && sizeof(T) == sizeof(float))
    return _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4);
#endif
  typename Vector<T>::type v = {};
  for (int i = 0; i < Vector<T>::lanes; ++i) v[i] = x[index[i]];
  return v;
}

// Whether the values of entries [first, first + count) lie next to one another among the free or the frozen ones.
inline bool follow(const Pattern& pattern, int64_t first, int64_t count, int64_t free_count) {
  uint32_t apart = 0;
  const int32_t* const slot = pattern.slot + first;
  for (int64_t i = 0; i < count; ++i) apart |= static_cast<uint32_t>(slot[i] - slot[0]) - static_cast<uint32_t>(i);
  return apart == 0 && (slot[0] >= free_count || slot[0] + count <= free_count);
}

// Prefetches `count` elements that follow kAhead elements later. An address past the end is harmless.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i + kAhead);
}

// The values of `count` entries: in place if they follow one another, else copied to `to`.
template <class T>
const T* values_of(const Pattern& pattern, int64_t first, int64_t count, const Values<T>& values, T* to) {
  const auto at = [&](int64_t slot) {
    return slot < values.free_count ? values.free + slot : values.frozen + (slot - values.free_count);
  };
  if (follow(pattern, first, count, values.free_count)) {
    const T* const from = at(pattern.slot[first]);
    prefetch(from, count);
    return from;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = *at(pattern.slot[first + i]);
  return to;
}

// Calls body(first, index, count) for the runs of a row.
template <class Body>
inline void in_runs(const Pattern& pattern, int64_t row, const Body& body) {
  for (int64_t k = pattern.ptr[row], last = pattern.ptr[row + 1]; k < last; k += kRun) {
    const int64_t count = std::min(kRun, last - k);
    prefetch(pattern.index + k, count);
    prefetch(pattern.slot + k, count);
    body(k, pattern.index + k, count);
  }
}

// Calls body(row) for rows whose indices and slots are in range. Returns false at the first other.
template <class Body>
inline bool for_rows(const Pattern& pattern, int64_t begin, int64_t end, int64_t slots, const Body& body) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = pattern.ptr[row], count = pattern.ptr[row + 1] - first;
    if (!in_range(pattern.index + first, pattern.slot + first, count, pattern.columns, slots)) return false;
    body(row);
  }
  return true;
}

// sums (width) = the products of `count` entries with lines of x, added up. Entries take turns among several sums, which
// shortens the chains of dependent additions and reduces rounding errors. A value minus zeros is broadcast as it is
// loaded; zeros plus a value would be an addition, because -0 + 0 is 0.
template <class T, int width>
void multiply_run(const int32_t* index, const T* value, int64_t count, const T* x, T* sums) {
  using L = Line<T, width>;
  using V = typename L::V;
  constexpr int vectors = L::vectors, turns = vectors * 4 <= kVectors ? 4 : 2;
  V sum[turns][vectors] = {};
  int64_t i = 0;
  for (; i + turns <= count; i += turns)
#pragma GCC unroll 4
    for (int turn = 0; turn < turns; ++turn) {
      const T* const from = x + static_cast<int64_t>(index[i + turn]) * width;
      const V factor = value[i + turn] - V{};
#pragma GCC unroll 8
      for (int b = 0; b < vectors; ++b) sum[turn][b] += factor * L::load(from + b * L::lanes);
    }
  for (; i < count; ++i) {
    const T* const from = x + static_cast<int64_t>(index[i]) * width;
    const V factor = value[i] - V{};
#pragma GCC unroll 8
    for (int b = 0; b < vectors; ++b) sum[0][b] += factor * L::load(from + b * L::lanes);
  }
#pragma GCC unroll 8
  for (int b = 0; b < vectors; ++b) {
    V total = sum[0][b] + sum[1][b];
    if constexpr (turns == 4) total += sum[2][b] + sum[3][b];
    L::store(total, sums + b * L::lanes);
  }
}

// The same for lines of one element: a register holds as many entries as it has lanes.
template <class T>
[[gnu::always_inline]] inline T gather_run(const int32_t* index, const T* value, int64_t count, const T* x) {
#if EXSSNET_X86
  if constexpr (gathers_with_masks<T>) {
    __m256 sum[2] = {};
    const auto add = [&](__m256& to, int64_t i, __mmask8 used) {
      const __m256i places = _mm256_maskz_loadu_epi32(used, index + i);
      const __m256 from = _mm256_mmask_i32gather_ps(_mm256_setzero_ps(), used, places, x, 4);
      to = _mm256_fmadd_ps(_mm256_maskz_loadu_ps(used, value + i), from, to);
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      add(sum[0], i, 0xff);
      add(sum[1], i + 8, 0xff);
    }
    if (i + 8 <= count) {
      add(sum[0], i, 0xff);
      i += 8;
    }
    if (i < count) add(sum[1], i, (1 << (count - i)) - 1);
    const __m256 all = sum[0] + sum[1];
    __m128 few = _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1);
    few += _mm_movehl_ps(few, few);
    return few[0] + few[1];
  }
#endif
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes, turns = 4;
  V sum[turns] = {};
  T total = 0;
  int64_t i = 0;
  for (; i + turns * lanes <= count; i += turns * lanes)
#pragma GCC unroll 4
    for (int turn = 0; turn < turns; ++turn)
      sum[turn] += Vector<T>::load(value + i + turn * lanes) * gather(x, index + i + turn * lanes);
  for (; i + lanes <= count; i += lanes) sum[0] += Vector<T>::load(value + i) * gather(x, index + i);
  for (; i < count; ++i) total += value[i] * x[index[i]];
  const V lane_sums = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return total + sum_each<T>([&](int) { return lane_sums; })[0];
}

// y (rows, columns) = the product with x. Each run of entries has its own sum.
template <class T, class S, int width>
bool multiply_few(const Pattern& pattern, const Values<T>& values, const Epilogue<T, S>& then, int64_t begin,
                  int64_t end, const T* x, int64_t columns, S* y) {
  T kept[kRun], sums[width], total[width];
  return for_rows(pattern, begin, end, values.count, [&](int64_t row) {
    for (int j = 0; j < width; ++j) total[j] = T(0);
    in_runs(pattern, row, [&](int64_t first, const int32_t* index, int64_t count) {
      const T* const kept_values = values_of(pattern, first, count, values, kept);
      if constexpr (width == 1) sums[0] = gather_run(index, kept_values, count, x);
      else multiply_run<T, width>(index, kept_values, count, x, sums);
      for (int j = 0; j < width; ++j) total[j] += sums[j];
    });
    const T scale = then.scale ? then.scale[row] : T(1), bias = then.bias ? then.bias[row] : T(0);
    for (int64_t j = 0; j < columns; ++j) {
      const T v = total[j] * scale + bias + (then.residual ? value(then.residual[row * columns + j]) : T(0));
      store(then.relu && v < 0 ? T(0) : v, y[row * columns + j]);
    }
  });
}

// Adds the products of the rows' entries with grad (rows, width) to sums (columns of the pattern, width).
template <class T, int width>
bool spread_few(const Pattern& pattern, const Values<T>& values, int64_t begin, int64_t end, const T* grad, T* sums) {
  using L = Line<T, width>;
  using V = typename L::V;
  constexpr int vectors = L::vectors;
  T kept[kRun];
  return for_rows(pattern, begin, end, values.count, [&](int64_t row) {
    V g[vectors];
#pragma GCC unroll 8
    for (int b = 0; b < vectors; ++b) g[b] = L::load(grad + row * width + b * L::lanes);
    in_runs(pattern, row, [&](int64_t first, const int32_t* index, int64_t count) {
      const T* const value = values_of(pattern, first, count, values, kept);
      for (int64_t i = 0; i < count; ++i) {
        T* const to = sums + static_cast<int64_t>(index[i]) * width;
        const V factor = value[i] - V{};
#pragma GCC unroll 8
        for (int b = 0; b < vectors; ++b) L::store(L::load(to + b * L::lanes) + factor * g[b], to + b * L::lanes);
      }
    });
  });
}

// grad_values[slot] of the rows' free entries: inner products of lines of x and of grad. One step computes as many as a
// line has lanes.
template <class T, int width>
bool sample_few(const Pattern& pattern, int64_t free_count, int64_t count, int64_t begin, int64_t end, const T* x,
                const T* grad, T* grad_values) {
  using L = Line<T, width>;
  using V = typename L::V;
  constexpr int vectors = L::vectors, lanes = L::lanes;
  T kept[kRun];
  return for_rows(pattern, begin, end, count, [&](int64_t row) {
    V g[vectors];
#pragma GCC unroll 8
    for (int b = 0; b < vectors; ++b) g[b] = L::load(grad + row * width + b * lanes);
    in_runs(pattern, row, [&](int64_t first, const int32_t* index, int64_t entries) {
      const bool in_place = follow(pattern, first, entries, free_count);
      const int64_t slot = pattern.slot[first];
      if (in_place && slot >= free_count) return;
      T* const to = in_place ? grad_values + slot : kept;
      int64_t i = 0;
      if constexpr (width == 1) {
        for (; i + Vector<T>::lanes <= entries; i += Vector<T>::lanes)
          Vector<T>::store(gather(x, index + i) * g[0], to + i);
        for (; i < entries; ++i) to[i] = x[index[i]] * g[0];
      } else {
        const auto products = [&](int64_t i) {
          const T* const from = x + static_cast<int64_t>(index[i]) * width;
          V sum = g[0] * L::load(from);
#pragma GCC unroll 8
          for (int b = 1; b < vectors; ++b) sum += g[b] * L::load(from + b * lanes);
          return sum;
        };
        for (; i + lanes <= entries; i += lanes)
          L::store(sum_each<T, lanes>([&](int j) { return products(i + j); }), to + i);
        if (i < entries) {
          const V last = sum_each<T, lanes>([&](int j) { return products(std::min(i + j, entries - 1)); });
          std::memcpy(to + i, &last, (entries - i) * sizeof(T));
        }
      }
      if (in_place) return;
      for (int64_t k = 0; k < entries; ++k)
        if (const int64_t at = pattern.slot[first + k]; at < free_count) grad_values[at] = kept[k];
    });
  });
}

template <class T, class S>
FewLoops<T, S> few_loops(int64_t width) {
  const auto of_width = []<int width>(std::integral_constant<int, width>) -> FewLoops<T, S> {
    return {multiply_few<T, S, width>, spread_few<T, width>, sample_few<T, width>};
  };
  return width == 1   ? of_width(std::integral_constant<int, 1>())
         : width == 4 ? of_width(std::integral_constant<int, 4>())
         : width == 8 ? of_width(std::integral_constant<int, 8>())
                      : of_width(std::integral_constant<int, 16>());
}
