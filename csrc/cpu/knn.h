// Votes of nearest neighbours, from the products of queries and features.
#pragma once

#include <cstdint>

namespace exssnet::cpu {

// squares[i] = squared length of row i of a (n, d) matrix.
template <class T>
void row_squares(const T* rows, int64_t n, int64_t d, T* squares);

// Majority label of each query's k nearest features: products (queries, n), squares of the features and labels in
// [0, classes) (n), 1 <= k <= n. Of equal distances the smaller index is nearer, NaN farthest; of equal votes the
// smaller label wins.
template <class T>
void vote(const T* products, int64_t queries, const T* squares, const int64_t* labels, int64_t n, int64_t k,
          int64_t classes, int64_t* predictions);

}  // namespace exssnet::cpu
