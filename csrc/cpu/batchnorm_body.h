// The inner loops of cpu/batchnorm.cpp over one chunk of the images (see dispatch.h). The chunk has elements of one
// channel, or of all channels in turn; Of is Channel or Turns.

// The numbers of the channels of one vector, like Channel.
template <class S>
struct Lanes {
  typename Vector<Wide<S>>::type mean, scale, shift, offset, slope;
};

template <class S, class T>
const Channel<T>& numbers(const Channel<T>& of, int64_t) {
  return of;
}

template <class S, class T>
Lanes<S> numbers(const Turns<T>& of, int64_t at) {
  const auto of_channels = [&](const T* from) { return Vector<T>::load(from + at); };
  return {of_channels(of.mean), of_channels(of.scale), of_channels(of.shift), of_channels(of.offset),
          of_channels(of.slope)};
}

// Calls step.template operator()<partial>(at, count, numbers) for vectors that cover [0, n). Only the last may be
// partial.
template <class S, class Of, class Step>
void in_vectors(int64_t n, const Of& of, const Step& step) {
  constexpr int64_t lanes = Vector<Wide<S>>::lanes;
  const Of copy = of;
  for (int64_t start = 0; start < n; start += copy.period) {
    const int64_t length = std::min(copy.period, n - start);
    int64_t at = 0;
#pragma GCC unroll 4
    for (; at + lanes <= length; at += lanes)
      step.template operator()<false>(start + at, lanes, numbers<S>(copy, at));
    if (at < length) step.template operator()<true>(start + at, length - at, numbers<S>(copy, at));
  }
}

// Loads a vector. Lanes beyond `count` of a partial vector are set to `fill`, a number or a vector.
template <bool partial, class S, class Fill>
typename Vector<Wide<S>>::type load(const S* from, int64_t count, const Fill& fill) {
  if constexpr (!partial) {
    return Vector<Wide<S>>::load(from);
  } else {
    typename Vector<Wide<S>>::type v = typename Vector<Wide<S>>::type{} + fill;
    for (int64_t i = 0; i < count; ++i) v[i] = value(from[i]);
    return v;
  }
}

// Stores a vector; with `stream` it bypasses the caches.
template <bool partial, class S>
void write(const typename Vector<Wide<S>>::type& v, S* to, int64_t count, bool stream) {
  if constexpr (partial) {
    for (int64_t i = 0; i < count; ++i) store(v[i], to[i]);
  } else {
    stream ? Vector<Wide<S>>::stream(v, to) : Vector<Wide<S>>::store(v, to);
  }
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

// `count` sums over [0, n). step.template operator()<partial>(at, size, numbers, sums) adds the terms of one vector.
// Every few vectors the sums are added to float64 sums, so that rounding errors stay near those of the terms.
template <class S, int count, class Step>
std::array<double, count> in_sums(int64_t n, const Channel<Wide<S>>& of, const Step& step) {
  using V = typename Vector<Wide<S>>::type;
  constexpr int64_t lanes = Vector<Wide<S>>::lanes, chains = 2, length = 4;
  const Channel<Wide<S>> c = of;
  Sum<Wide<S>> sums[count];
  int64_t at = 0;
  for (; at + chains * length * lanes <= n; at += chains * length * lanes) {
    V some[chains][count] = {};
#pragma GCC unroll 8
    for (int i = 0; i < chains * length; ++i)
      step.template operator()<false>(at + i * lanes, lanes, c, some[i % chains]);
    for (int k = 0; k < count; ++k) sums[k].add(some[0][k] + some[1][k]);
  }
  for (; at < n; at += lanes) {
    V some[count] = {};
    if (at + lanes <= n) step.template operator()<false>(at, lanes, c, some);
    else step.template operator()<true>(at, n - at, c, some);
    for (int k = 0; k < count; ++k) sums[k].add(some[k]);
  }
  std::array<double, count> totals;
  for (int k = 0; k < count; ++k) totals[k] = sums[k].total();
  return totals;
}

// The same for each number of Turns: `count` times a period of sums. A sum of `length` terms is added to a float64 sum.
template <class S, int count, class Step>
std::vector<double> in_sums(int64_t n, const Turns<Wide<S>>& of, const Step& step) {
  constexpr int64_t lanes = Vector<Wide<S>>::lanes, length = 8;
  const int64_t period = of.period;
  std::vector<double> totals(count * period);
  for (int64_t start = 0; start < n; start += length * period) {
    const int64_t end = std::min(n, start + length * period);
    for (int64_t at = 0; at < period; at += lanes) {
      const auto c = numbers<S>(of, at);
      typename Vector<Wide<S>>::type some[count] = {};
      int64_t i = start + at;
      for (; i + lanes <= end; i += period) step.template operator()<false>(i, lanes, c, some);
      if (i < end) step.template operator()<true>(i, end - i, c, some);
      for (int k = 0; k < count; ++k)
        for (int64_t lane = 0; lane < lanes; ++lane) totals[k * period + at + lane] += some[k][lane];
    }
  }
  return totals;
}

// Adds the mean and the sum of squared deviations of a chunk to `to`: one, or one for each number of Turns. The chunk
// is in a cache when the second loop reads it.
template <class S, class Of>
void moments(const S* x, int64_t n, const Of& of, Moments* to) {
  using V = typename Vector<Wide<S>>::type;
  using T = Wide<S>;
  const auto sum = in_sums<S, 1>(n, of, [&]<bool partial>(int64_t at, int64_t size, const auto&, V* sums) {
    sums[0] += load<partial>(x + at, size, T(0));
  });
  if constexpr (std::is_same_v<Of, Channel<T>>) {
    const double mean = sum[0] / n;
    const Channel<T> centre{static_cast<T>(mean), 0, 0, 0, 0};
    const auto squares = in_sums<S, 1>(n, centre, [&]<bool partial>(int64_t at, int64_t size, const auto& c, V* sums) {
      const V d = load<partial>(x + at, size, c.mean) - c.mean;
      sums[0] += d * d;
    });
    *to = {double(n), mean, squares[0] - n * (mean - centre.mean) * (mean - centre.mean)};
  } else {
    std::vector<T> centres(of.period);
    const auto count = [&](int64_t i) { return i < n ? (n - i - 1) / of.period + 1 : 0; };
    for (int64_t i = 0; i < std::min(n, of.period); ++i) centres[i] = static_cast<T>(sum[i] / count(i));
    Turns<T> centre = of;
    centre.mean = centres.data();
    const auto sums_of = in_sums<S, 2>(n, centre, [&]<bool partial>(int64_t at, int64_t size, const auto& c, V* sums) {
      const V d = load<partial>(x + at, size, c.mean) - c.mean;
      sums[0] += d;  // more accurate than the sum of x
      sums[1] += d * d;
    });
    for (int64_t i = 0; i < std::min(n, of.period); ++i) {
      const double terms = count(i), step = sums_of[i] / terms;
      to[i] = merged(to[i], {terms, centres[i] + step, sums_of[of.period + i] - terms * step * step});
    }
  }
}

// The input of ReLU without a residual. The backward pass computes it again, with the same bits.
template <class S, class Numbers>
typename Vector<Wide<S>>::type normalised(const typename Vector<Wide<S>>::type& x, const Numbers& c) {
  return (x - c.mean) * c.scale + c.shift;
}

template <class S, bool with_residual, bool relu, class Of>
void normalise(const S* x, const S* residual, int64_t n, const Of& of, bool stream, S* y) {
  using V = typename Vector<Wide<S>>::type;
  using T = Wide<S>;
  in_vectors<S>(n, of, [&]<bool partial>(int64_t at, int64_t count, const auto& c) {
    V v = normalised<S>(load<partial>(x + at, count, T(0)), c);
    if constexpr (with_residual) v += load<partial>(residual + at, count, T(0));
    if constexpr (relu) v = v <= 0 ? V{} : v;  // NaN stays
    write<partial>(v, y + at, count, stream);
  });
}

// The gradient before ReLU.
template <class S, Relu relu, bool partial, class Numbers>
typename Vector<Wide<S>>::type masked(const S* grad, const typename Vector<Wide<S>>::type& x, const S* y, int64_t at,
                                      int64_t count, const Numbers& c) {
  using V = typename Vector<Wide<S>>::type;
  using T = Wide<S>;
  const V g = load<partial>(grad + at, count, T(0));
  if constexpr (relu == Relu::of_x) return normalised<S>(x, c) <= 0 ? V{} : g;
  if constexpr (relu == Relu::of_y) return load<partial>(y + at, count, T(0)) <= 0 ? V{} : g;
  return g;
}

// Adds the sums of grad and of grad * (x - mean) to `to`, as `moments` does. With `keep`, the gradient before ReLU is
// written to `kept`.
template <class S, Relu relu, bool keep, class Of>
void gradient_sums(const S* grad, const S* x, const S* y, int64_t n, const Of& of, S* kept, Sums* to) {
  using V = typename Vector<Wide<S>>::type;
  const auto sum = in_sums<S, 2>(n, of, [&]<bool partial>(int64_t at, int64_t size, const auto& c, V* sums) {
    const V v = load<partial>(x + at, size, c.mean), g = masked<S, relu, partial>(grad, v, y, at, size, c);
    sums[0] += g;
    sums[1] += g * (v - c.mean);
    if constexpr (keep) write<partial>(g, kept + at, size, false);
  });
  if constexpr (std::is_same_v<Of, Channel<Wide<S>>>) *to = {sum[0], sum[1]};
  else
    for (int64_t i = 0; i < of.period; ++i) to[i] = {to[i].grad + sum[i], to[i].product + sum[of.period + i]};
}

// scale * (grad - offset - slope * (x - mean)); without `training`, scale * grad.
template <class S, Relu relu, bool training, class Of>
void input_gradient(const S* grad, const S* x, const S* y, int64_t n, const Of& of, bool stream, S* grad_x) {
  using V = typename Vector<Wide<S>>::type;
  in_vectors<S>(n, of, [&]<bool partial>(int64_t at, int64_t count, const auto& c) {
    V v = {};
    if constexpr (training || relu == Relu::of_x) v = load<partial>(x + at, count, c.mean);
    V g = masked<S, relu, partial>(grad, v, y, at, count, c);
    if constexpr (training) g = g - c.offset - c.slope * (v - c.mean);
    write<partial>(g * c.scale, grad_x + at, count, stream);
  });
}
