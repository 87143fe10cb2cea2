// The geometry of a convolution, and the sparse matrix of a mask, for the CPU and CUDA kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace exssnet {

// Height or width of a convolution. For output i, tap t reads the padded pixel i * stride + t * dilation. This is
// position i + shift(t) among the pixels of phase(t) of the input.
struct Window {
  int64_t in, out, taps, stride, padding, dilation;

  int64_t phases() const { return std::min(taps, stride / std::gcd(stride, dilation)); }
  int64_t phase(int64_t tap) const { return tap % phases(); }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t reach() const { return shift(taps - 1); }
  bool is_pointwise() const { return taps == 1 && stride == 1 && padding == 0; }
};

struct Convolution {
  int64_t batch, in_channels, out_channels;
  Window h, w;
};

// A sparse matrix of `rows` x (channels * taps) in CSR. slot is an entry's index in [free values; frozen values].
struct Pattern {
  const int32_t *ptr, *index, *slot;
  int64_t rows, columns, entries;
};

// Whether the pointers (rows + 1) ascend from 0 to the number of entries.
inline bool rises(const int32_t* ptr, int64_t rows, int64_t entries) {
  return ptr[0] == 0 && ptr[rows] == entries && std::is_sorted(ptr, ptr + rows + 1);
}

// Whether a pattern has these numbers of rows and columns, and its pointers ascend from 0 to the number of entries.
inline bool has_rows(const Pattern& pattern, int64_t rows, int64_t columns) {
  return pattern.rows == rows && pattern.columns == columns && rises(pattern.ptr, rows, pattern.entries);
}

}  // namespace exssnet
