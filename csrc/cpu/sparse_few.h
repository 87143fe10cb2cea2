// Sparse products with a few columns: linear layers of up to 16 samples, and pointwise convolutions of as few pixels.
//
// The columns do not fill the vectors of cpu/sparse.h, and the time goes into reading the pattern. So the pattern and
// the values are read once, row by row, in place. A line, the elements of one feature, is padded to 1, 4, 8 or 16. The
// input's gradient adds each row's products to the lines of the result, for which no transposed pattern is needed: its
// values would be read in random order. Arguments and results are those of cpu/sparse.h.
#pragma once

#include "cpu/sparse.h"

namespace exssnet::cpu {

// The number of columns if these products are to be used, else -1.
inline int64_t few_columns(const Convolution& c) {
  const int64_t columns = c.h.in * c.w.in * c.batch;
  return c.h.is_pointwise() && c.w.is_pointwise() && columns <= 16 ? columns : -1;
}

template <class T, class S>
bool few_forward(const Convolution& c, const Pattern& pattern, const Values<T>& values, const Epilogue<T, S>& epilogue,
                 const S* x, S* y);

// The number of parts, which are summed up apart, does not depend on the number of threads.
template <class T, class S>
bool few_input_gradient(const Convolution& c, const Pattern& pattern, const Values<T>& values, const S* grad,
                        S* grad_x);

// Writes the gradients of the values that the pattern has; the others must be zero already.
template <class T, class S>
bool few_value_gradient(const Convolution& c, const Pattern& pattern, int64_t free_count, int64_t count, const S* x,
                        const S* grad, T* grad_values);

}  // namespace exssnet::cpu
