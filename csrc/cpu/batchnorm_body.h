// The inner loops of cpu/batchnorm.cpp over one chunk of a channel (see dispatch.h).

// Calls step.template operator()<partial>(at, count) for vectors that cover [0, n). Only the last may be partial.
template <class T, class Step>
void in_vectors(int64_t n, const Step& step) {
  constexpr int64_t lanes = Vector<T>::lanes;
  int64_t at = 0;
#pragma GCC unroll 4
  for (; at + lanes <= n; at += lanes) step.template operator()<false>(at, lanes);
  if (at < n) step.template operator()<true>(at, n - at);
}

// Loads a vector. Lanes beyond `count` of a partial vector are set to `fill`.
template <bool partial, class T>
typename Vector<T>::type load(const T* from, int64_t count, T fill) {
  typename Vector<T>::type v = typename Vector<T>::type{} + fill;
  std::memcpy(&v, from, partial ? count * sizeof(T) : sizeof v);
  return v;
}

template <bool partial, class T>
void store(const typename Vector<T>::type& v, T* to, int64_t count) {
  std::memcpy(to, &v, partial ? count * sizeof(T) : sizeof v);
}

// Stores a vector; with `stream` it bypasses the caches.
template <bool partial, class T>
void write(const typename Vector<T>::type& v, T* to, int64_t count, bool stream) {
  if (!partial && stream) Vector<T>::stream(v, to);
  else store<partial>(v, to, count);
}

// Sum in float64 of vectors that are added one at a time.
template <class T>
struct Sum {
  typename Vector<double>::type sum = {};

  void add(const typename Vector<T>::type& v) {
    if constexpr (sizeof(T) == sizeof(double)) {
      sum += v;
    } else {
      typedef T half __attribute__((vector_size(kVectorBytes / 2)));
      half halves[2];
      std::memcpy(halves, &v, sizeof v);
      sum += __builtin_convertvector(halves[0] + halves[1], typename Vector<double>::type);
    }
  }

  double total() const {
    double result = 0;
    for (int lane = 0; lane < Vector<double>::lanes; ++lane) result += sum[lane];
    return result;
  }
};

// `count` sums over [0, n). step.template operator()<partial>(at, size, sums) adds the terms of one vector. Every few
// vectors the sums are added to float64 sums, so that rounding errors stay near those of the terms.
template <class T, int count, class Step>
std::array<double, count> in_sums(int64_t n, const Step& step) {
  using V = typename Vector<T>::type;
  constexpr int64_t lanes = Vector<T>::lanes, chains = 2, length = 4;
  Sum<T> sums[count];
  int64_t at = 0;
  for (; at + chains * length * lanes <= n; at += chains * length * lanes) {
    V some[chains][count] = {};
#pragma GCC unroll 8
    for (int i = 0; i < chains * length; ++i)
      step.template operator()<false>(at + i * lanes, lanes, some[i % chains]);
    for (int k = 0; k < count; ++k) sums[k].add(some[0][k] + some[1][k]);
  }
  for (; at < n; at += lanes) {
    V some[count] = {};
    if (at + lanes <= n) step.template operator()<false>(at, lanes, some);
    else step.template operator()<true>(at, n - at, some);
    for (int k = 0; k < count; ++k) sums[k].add(some[k]);
  }
  std::array<double, count> totals;
  for (int k = 0; k < count; ++k) totals[k] = sums[k].total();
  return totals;
}

// Mean and sum of squared deviations of a chunk. The chunk is in the L1 cache when the second loop reads it.
template <class T>
Moments moments(const T* x, int64_t n) {
  using V = typename Vector<T>::type;
  const auto [sum] = in_sums<T, 1>(n, [&]<bool partial>(int64_t at, int64_t size, V* sums) {
    sums[0] += load<partial>(x + at, size, T(0));
  });
  const double mean = sum / n;
  const T centre = static_cast<T>(mean);
  const auto [squares] = in_sums<T, 1>(n, [&]<bool partial>(int64_t at, int64_t size, V* sums) {
    const V d = load<partial>(x + at, size, centre) - centre;
    sums[0] += d * d;
  });
  return {double(n), mean, squares - n * (mean - centre) * (mean - centre)};
}

// The input of ReLU without a residual. The backward pass computes it again, with the same bits.
template <class T>
typename Vector<T>::type normalised(const typename Vector<T>::type& x, const Channel<T>& c) {
  return (x - c.mean) * c.scale + c.shift;
}

template <class T, bool with_residual, bool relu>
void normalise(const T* x, const T* residual, int64_t n, const Channel<T>& channel, bool stream, T* y) {
  using V = typename Vector<T>::type;
  const Channel<T> c = channel;
  in_vectors<T>(n, [&]<bool partial>(int64_t at, int64_t count) {
    V v = normalised<T>(load<partial>(x + at, count, T(0)), c);
    if constexpr (with_residual) v += load<partial>(residual + at, count, T(0));
    if constexpr (relu) v = v <= 0 ? V{} : v;  // NaN stays
    write<partial>(v, y + at, count, stream);
  });
}

// The gradient before ReLU.
template <class T, Relu relu, bool partial>
typename Vector<T>::type masked(const T* grad, const typename Vector<T>::type& x, const T* y, int64_t at, int64_t count,
                                const Channel<T>& c) {
  using V = typename Vector<T>::type;
  const V g = load<partial>(grad + at, count, T(0));
  if constexpr (relu == Relu::of_x) return normalised<T>(x, c) <= 0 ? V{} : g;
  if constexpr (relu == Relu::of_y) return load<partial>(y + at, count, T(0)) <= 0 ? V{} : g;
  return g;
}

// The sums of grad and of grad * (x - mean). With `keep`, the gradient before ReLU is written to `kept`.
template <class T, Relu relu, bool keep>
Sums gradient_sums(const T* grad, const T* x, const T* y, int64_t n, const Channel<T>& channel, T* kept) {
  using V = typename Vector<T>::type;
  const Channel<T> c = channel;
  const auto [sum, product] = in_sums<T, 2>(n, [&]<bool partial>(int64_t at, int64_t size, V* sums) {
    const V v = load<partial>(x + at, size, c.mean), g = masked<T, relu, partial>(grad, v, y, at, size, c);
    sums[0] += g;
    sums[1] += g * (v - c.mean);
    if constexpr (keep) store<partial>(g, kept + at, size);
  });
  return {sum, product};
}

// scale * (grad - offset - slope * (x - mean)); without `training`, scale * grad.
template <class T, Relu relu, bool training>
void input_gradient(const T* grad, const T* x, const T* y, int64_t n, const Channel<T>& channel, bool stream,
                    T* grad_x) {
  using V = typename Vector<T>::type;
  const Channel<T> c = channel;
  in_vectors<T>(n, [&]<bool partial>(int64_t at, int64_t count) {
    V v = {};
    if constexpr (training || relu == Relu::of_x) v = load<partial>(x + at, count, c.mean);
    V g = masked<T, relu, partial>(grad, v, y, at, count, c);
    if constexpr (training) g = g - c.offset - c.slope * (v - c.mean);
    write<partial>(g * c.scale, grad_x + at, count, stream);
  });
}
