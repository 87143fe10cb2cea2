// Majority vote of the nearest neighbours, from the products of queries and features.
#pragma once

#include <cstdint>

namespace exssnet::cpu {

// squares[i] = squared length of row i of an (n, d) matrix.
template <class T>
void row_squares(const T* rows, int64_t n, int64_t d, T* squares);

// Majority label of the k nearest features of each query, 1 <= k <= n. products: (queries, n); squares of the features:
// (n); labels: (n), in [0, classes). Ties of distance go to the smaller index; NaN is farthest. Ties of votes go to the
// smaller label.
template <class T>
void vote(const T* products, int64_t queries, const T* squares, const int64_t* labels, int64_t n, int64_t k,
          int64_t classes, int64_t* predictions);

}  // namespace exssnet::cpu
