#include "cpu/sparse_few.h"

#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/few_columns.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

#if EXSSNET_X86
#include <immintrin.h>
#endif

namespace exssnet::cpu {

namespace {

constexpr int64_t kGrain = 1 << 15;  // entries per thread, at least
constexpr int64_t kParts = 8;        // of the input's gradient, at most: each has sums of its own
constexpr int64_t kRun = 256;        // entries of a row that are treated together
constexpr int64_t kAhead = 768;      // entries between what is used and what is prefetched

// The loops over rows [begin, end), for lines of `width` elements of which the first `columns` are used.
template <class T, class S>
struct FewLoops {
  bool (*multiply)(const Pattern& pattern, const Values<T>& values, const Epilogue<T, S>& then, int64_t begin,
                   int64_t end, const T* x, int64_t columns, S* y);
  bool (*spread)(const Pattern& pattern, const Values<T>& values, int64_t begin, int64_t end, const T* grad, T* sums);
  bool (*sample)(const Pattern& pattern, int64_t free_count, int64_t count, int64_t begin, int64_t end, const T* x,
                 const T* grad, T* grad_values);
};

#define EXSSNET_BODY "cpu/sparse_few_body.h"
#include "cpu/each_isa.h"

template <class T>
T* scratch(int64_t count) {
  thread_local std::vector<std::byte> kept;
  return room_in<T>(kept, count);
}

// Whether lines of `columns` elements are used in place.
template <class T, class S>
bool in_place(int64_t columns, int64_t width) {
  return std::is_same_v<T, S> && columns == width;
}

// Lines of `columns` elements as lines of `width` elements: copies to `to`, filled with zeros, if not used in place.
template <class T, class S>
const T* padded(const S* from, int64_t lines, int64_t columns, int64_t width, T* to) {
  if constexpr (std::is_same_v<T, S>)
    if (columns == width) return from;
  if (columns == width) lines *= columns, columns = width = 1;
  for (T* line = to; line < to + lines * width; line += width, from += columns) {
    for (int64_t j = 0; j < columns; ++j) line[j] = value(from[j]);
    for (int64_t j = columns; j < width; ++j) line[j] = T(0);
  }
  return to;
}

int64_t parts_of(const Pattern& pattern) {
  return std::max<int64_t>(1, std::min(max_threads(), pattern.entries / kGrain));
}

}  // namespace

template <class T, class S>
bool few_forward(const Convolution& c, const Pattern& pattern, const Values<T>& values, const Epilogue<T, S>& epilogue,
                 const S* x, S* y) {
  if (!has_rows(pattern, c.out_channels, c.in_channels)) return false;
  const int64_t columns = few_columns(c), width = line_width(columns);
  const auto multiply = EXSSNET_PICK(few_loops<T, S>)(width).multiply;
  const int64_t copied = in_place<T, S>(columns, width) ? 0 : c.in_channels * width;
  const T* const lines = padded(x, c.in_channels, columns, width, scratch<T>(copied));
  return in_parts(pattern.ptr, pattern.rows, parts_of(pattern), [&](int64_t, int64_t begin, int64_t end) {
    return multiply(pattern, values, epilogue, begin, end, lines, columns, y);
  });
}

template <class T, class S>
bool few_input_gradient(const Convolution& c, const Pattern& pattern, const Values<T>& values, const S* grad,
                        S* grad_x) {
  if (!has_rows(pattern, c.out_channels, c.in_channels)) return false;
  const int64_t columns = few_columns(c), width = line_width(columns), size = c.in_channels * width;
  const int64_t parts = std::clamp<int64_t>(pattern.entries / std::max(kGrain, 16 * c.in_channels), 1, kParts);
  const int64_t copied = in_place<T, S>(columns, width) ? 0 : c.out_channels * width;
  T* const sums = scratch<T>(parts * size + copied);
  const auto spread = EXSSNET_PICK(few_loops<T, S>)(width).spread;
  const T* const lines = padded(grad, c.out_channels, columns, width, sums + parts * size);
  const bool good = in_parts(pattern.ptr, pattern.rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    T* const of_part = sums + part * size;
    std::fill_n(of_part, size, T(0));
    return spread(pattern, values, begin, end, lines, of_part);
  });
  parallel_for(c.in_channels, kGrain / width, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = begin * width; i < end * width; ++i) sums[i] += sums[part * size + i];
    for (int64_t line = begin; line < end; ++line)
      for (int64_t j = 0; j < columns; ++j) store(sums[line * width + j], grad_x[line * columns + j]);
  });
  return good;
}

template <class T, class S>
bool few_value_gradient(const Convolution& c, const Pattern& pattern, int64_t free_count, int64_t count, const S* x,
                        const S* grad, T* grad_values) {
  if (!has_rows(pattern, c.out_channels, c.in_channels)) return false;
  const int64_t columns = few_columns(c), width = line_width(columns);
  const auto sample = EXSSNET_PICK(few_loops<T, S>)(width).sample;
  const int64_t copied = in_place<T, S>(columns, width) ? 0 : (c.in_channels + c.out_channels) * width;
  T* const room = scratch<T>(copied);
  const T* const lines = padded(x, c.in_channels, columns, width, room);
  const T* const grads = padded(grad, c.out_channels, columns, width, room + c.in_channels * width);
  return in_parts(pattern.ptr, pattern.rows, parts_of(pattern), [&](int64_t, int64_t begin, int64_t end) {
    return sample(pattern, free_count, count, begin, end, lines, grads, grad_values);
  });
}

#define EXSSNET_INSTANTIATE(T, S)                                                                                   \
  template bool few_forward(const Convolution&, const Pattern&, const Values<T>&, const Epilogue<T, S>&, const S*, \
                            S*);                                                                                    \
  template bool few_input_gradient(const Convolution&, const Pattern&, const Values<T>&, const S*, S*);             \
  template bool few_value_gradient(const Convolution&, const Pattern&, int64_t, int64_t, const S*, const S*, T*);
EXSSNET_INSTANTIATE(float, float)
EXSSNET_INSTANTIATE(double, double)
EXSSNET_INSTANTIATE(float, BFloat16)

}  // namespace exssnet::cpu
