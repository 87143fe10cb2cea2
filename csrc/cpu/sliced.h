// Products of a sparse matrix with a few columns, for inference: linear layers of few samples.
//
// These are bound by what is read of the matrix. So it is stored as it is read, in slices of 16 rows (sliced ELLPACK,
// Kreutzer et al. 2014, arXiv 1307.6209): 2 bytes for a column and 4 or 2 for a value. Rows are sorted by their numbers
// of entries, so that the rows of a slice are equally long. A line of a slice has the next entry of each of its rows.
// Where a row has ended, the column is `columns`. There the input is zero, so that infinities do no harm.
#pragma once

#include <cstdint>

#include "core/floats.h"
#include "core/pattern.h"

namespace exssnet::cpu {

constexpr int64_t kSlice = 16;  // rows of a slice

struct Sliced {
  const int32_t* ptr;   // (slices + 1), the first line of each slice
  const int32_t* row;   // (rows), the rows in the order of the slices
  const uint16_t* col;  // (lines, 16)
  const void* values;   // (lines, 16), float, or bfloat16 if `narrow`
  bool narrow;
  int64_t rows, columns, lines;

  int64_t slices() const { return (rows + kSlice - 1) / kSlice; }
};

// y (rows, batch) from x (columns, batch), of strides x_column and x_sample; the bias (rows) may be null. Sums are
// float32. Returns false if a pointer, row or column is out of range. Then only memory of y has been written.
template <class S>
bool sliced_forward(const Sliced& matrix, const float* bias, int64_t batch, const S* x, int64_t x_column,
                    int64_t x_sample, S* y);

}  // namespace exssnet::cpu
