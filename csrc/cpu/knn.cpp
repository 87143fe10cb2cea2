#include "cpu/knn.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {

constexpr int64_t kGrain = 1 << 15;  // distances per thread, at least

template <class T>
struct Neighbour {
  T distance;  // without the query's squared length, which is the same for all neighbours
  int64_t index;

  bool operator<(const Neighbour& other) const {
    if (distance != other.distance) {
      const bool here = distance == distance, there = other.distance == other.distance;
      if (here && there) return distance < other.distance;
      if (here != there) return here;
    }
    return index < other.index;
  }
};

// Moves the k nearest to the front of `near`, which is scratch memory. Candidates that are farther than the k-th
// nearest so far are skipped.
template <class T>
void nearest(const T* products, const T* squares, int64_t n, int64_t k, std::vector<Neighbour<T>>& near) {
  constexpr int64_t kBlock = 64;
  const int64_t capacity = k + std::max(k, kBlock) + kBlock;
  near.resize(capacity);
  T limit = std::numeric_limits<T>::quiet_NaN();  // nothing is skipped yet
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    T distance[kBlock];
    int in = 0;
    for (int64_t j = 0; j < size; ++j) {
      distance[j] = squares[begin + j] - 2 * products[begin + j];
      in |= !(distance[j] >= limit);
    }
    if (!in) continue;
    for (int64_t j = 0; j < size; ++j) {
      near[count] = {distance[j], begin + j};
      count += !(distance[j] >= limit);
    }
    if (count > capacity - kBlock) {
      std::nth_element(near.begin(), near.begin() + (k - 1), near.begin() + count);
      limit = near[k - 1].distance;
      count = k;
    }
  }
  std::nth_element(near.begin(), near.begin() + (k - 1), near.begin() + count);
}

}  // namespace

template <class T>
void row_squares(const T* rows, int64_t n, int64_t d, T* squares) {
  parallel_for(n, kGrain / (d + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = rows + i * d;
      double sums[8] = {};  // 8 independent sums, because additions to a single sum would wait for each other
      int64_t j = 0;
      for (; j + 8 <= d; j += 8)
        for (int lane = 0; lane < 8; ++lane) sums[lane] += static_cast<double>(row[j + lane]) * row[j + lane];
      for (; j < d; ++j) sums[0] += static_cast<double>(row[j]) * row[j];
      squares[i] = static_cast<T>(std::accumulate(sums, sums + 8, 0.0));
    }
  });
}

template <class T>
void vote(const T* products, int64_t queries, const T* squares, const int64_t* labels, int64_t n, int64_t k,
          int64_t classes, int64_t* predictions) {
  parallel_for(queries, kGrain / (n + 1) + 1, [=](int64_t begin, int64_t end) {
    std::vector<Neighbour<T>> near;
    std::vector<int64_t> votes(classes);
    for (int64_t q = begin; q < end; ++q) {
      nearest(products + q * n, squares, n, k, near);
      for (int64_t i = 0; i < k; ++i) ++votes[labels[near[i].index]];
      int64_t best = labels[near[0].index];
      for (int64_t i = 0; i < k; ++i) {
        const int64_t label = labels[near[i].index];
        if (votes[label] > votes[best] || (votes[label] == votes[best] && label < best)) best = label;
      }
      predictions[q] = best;
      for (int64_t i = 0; i < k; ++i) votes[labels[near[i].index]] = 0;
    }
  });
}

template void row_squares(const float*, int64_t, int64_t, float*);
template void row_squares(const double*, int64_t, int64_t, double*);
template void vote(const float*, int64_t, const float*, const int64_t*, int64_t, int64_t, int64_t, int64_t*);
template void vote(const double*, int64_t, const double*, const int64_t*, int64_t, int64_t, int64_t, int64_t*);

}  // namespace exssnet::cpu
