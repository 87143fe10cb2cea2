#include "cpu/batchnorm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/streaming.h"

namespace exssnet::cpu {

namespace {

constexpr int64_t kChunkBytes = 16384;  // part of a row that is summed at a time: half of an L1 cache
constexpr int64_t kGrain = 1 << 15;     // elements per thread, at least

struct Moments {
  double count, mean, squares;  // squares: the sum of squared deviations from the mean
};

struct Sums {
  double grad, product;  // sums of grad and of grad * (x - mean)
};

template <class T>
struct Channel {
  T mean, scale, shift, offset, slope;
};

enum class Relu { none, of_x, of_y };  // the tensor that shows where the input of ReLU was positive

#define EXSSNET_BODY "cpu/batchnorm_body.h"
#include "cpu/each_isa.h"

template <class T>
Channel<T> channel_of(const BatchNorm<T>& norm, int64_t c, T mean, T var) {
  const double scale = (norm.weight ? norm.weight[c] : 1) / std::sqrt(double(var) + norm.eps);
  return {mean, static_cast<T>(scale), norm.bias ? norm.bias[c] : T(0), 0, 0};
}

// Moments of the union of two sets (Chan, Golub & LeVeque 1979).
Moments merged(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, step = b.mean - a.mean;
  return {count, a.mean + step * b.count / count, a.squares + b.squares + step * step * a.count * b.count / count};
}

// Whether the rows may be streamed (see streaming.h): all of them must be aligned to vectors.
template <class T>
bool rows_stream(const BatchNorm<T>& norm, const T* result) {
  const int64_t row_bytes = norm.size * sizeof(T);
  return row_bytes % kStreamAlignment == 0 && is_streamed(result, norm.channels * row_bytes);
}

// For every channel: part = measure(c, at, n) for each chunk of its row, then finish(c, parts), then apply(c, at, n)
// for each chunk. If one thread processes the whole row, the row stays in its cache. The chunks and the order of the
// parts do not depend on the number of threads.
template <class T, class Part, class Measure, class Finish, class Apply>
void in_two_passes(const BatchNorm<T>& norm, const Measure& measure, const Finish& finish, const Apply& apply) {
  constexpr int64_t kChunk = kChunkBytes / sizeof(T);
  const int64_t chunks = (norm.size + kChunk - 1) / kChunk, threads = max_threads();
  const auto length = [&](int64_t chunk) { return std::min(kChunk, norm.size - chunk * kChunk); };
  if (threads == 1 || chunks <= 1 || norm.channels >= 4 * threads) {
    parallel_for(norm.channels, kGrain / std::max<int64_t>(norm.size, 1) + 1, [&](int64_t begin, int64_t end) {
      std::vector<Part> parts(chunks);
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t i = 0; i < chunks; ++i) parts[i] = measure(c, i * kChunk, length(i));
        finish(c, parts.data(), chunks);
        for (int64_t i = 0; i < chunks; ++i) apply(c, i * kChunk, length(i));
      }
      finish_streams();
    });
    return;
  }
  std::vector<Part> parts(norm.channels * chunks);
  const auto for_chunks = [&](const auto& body) {
    parallel_for(norm.channels * chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, i / chunks, i % chunks);
      finish_streams();
    });
  };
  for_chunks([&](int64_t i, int64_t c, int64_t chunk) { parts[i] = measure(c, chunk * kChunk, length(chunk)); });
  for (int64_t c = 0; c < norm.channels; ++c) finish(c, parts.data() + c * chunks, chunks);
  for_chunks([&](int64_t, int64_t c, int64_t chunk) { apply(c, chunk * kChunk, length(chunk)); });
}

template <class T, Relu relu>
void gradients(const BatchNorm<T>& norm, const T* grad, const T* x, const T* y, const T* mean, const T* var,
               bool training, T* grad_x, T* kept, T* grad_weight, T* grad_bias) {
  const auto sums = kept ? EXSSNET_PICK(gradient_sums<T, relu, true>) : EXSSNET_PICK(gradient_sums<T, relu, false>);
  const auto from_grad =
      training ? EXSSNET_PICK(input_gradient<T, relu, true>) : EXSSNET_PICK(input_gradient<T, relu, false>);
  const auto from_kept = training ? EXSSNET_PICK(input_gradient<T, Relu::none, true>)
                                  : EXSSNET_PICK(input_gradient<T, Relu::none, false>);
  const bool stream = rows_stream(norm, grad_x);
  const bool need_sums = training || kept || grad_weight || grad_bias;
  std::vector<Channel<T>> channels(norm.channels);
  for (int64_t c = 0; c < norm.channels; ++c) channels[c] = channel_of(norm, c, mean[c], var[c]);
  in_two_passes<T, Sums>(
      norm,
      [&](int64_t c, int64_t at, int64_t n) {
        const int64_t i = c * norm.size + at;
        return need_sums ? sums(grad + i, x + i, y ? y + i : y, n, channels[c], kept ? kept + i : kept) : Sums{};
      },
      [&](int64_t c, const Sums* parts, int64_t count) {
        Sums sum{};
        for (int64_t i = 0; i < count; ++i) sum = {sum.grad + parts[i].grad, sum.product + parts[i].product};
        const double precision = 1 / (double(var[c]) + norm.eps);
        if (grad_weight) grad_weight[c] = static_cast<T>(count ? sum.product * std::sqrt(precision) : 0);
        if (grad_bias) grad_bias[c] = static_cast<T>(sum.grad);
        channels[c].offset = static_cast<T>(sum.grad / norm.size);
        channels[c].slope = static_cast<T>(sum.product * precision / norm.size);
      },
      [&](int64_t c, int64_t at, int64_t n) {
        const int64_t i = c * norm.size + at;
        if (grad_x && kept) from_kept(kept + i, x + i, nullptr, n, channels[c], stream, grad_x + i);
        else if (grad_x) from_grad(grad + i, x + i, y ? y + i : y, n, channels[c], stream, grad_x + i);
      });
}

}  // namespace

template <class T>
void batch_norm(const BatchNorm<T>& norm, const T* x, const T* residual, bool given, T* mean, T* var, T* y) {
  const auto measure = EXSSNET_PICK(moments<T>);
  const auto added = norm.relu ? EXSSNET_PICK(normalise<T, true, true>) : EXSSNET_PICK(normalise<T, true, false>);
  const auto alone = norm.relu ? EXSSNET_PICK(normalise<T, false, true>) : EXSSNET_PICK(normalise<T, false, false>);
  const bool stream = rows_stream(norm, y);
  std::vector<Channel<T>> channels(norm.channels);
  in_two_passes<T, Moments>(
      norm,
      [&](int64_t c, int64_t at, int64_t n) { return given ? Moments{} : measure(x + c * norm.size + at, n); },
      [&](int64_t c, const Moments* parts, int64_t count) {
        if (!given) {
          Moments row = count ? parts[0] : Moments{};
          for (int64_t i = 1; i < count; ++i) row = merged(row, parts[i]);
          mean[c] = static_cast<T>(count ? row.mean : NAN);
          var[c] = static_cast<T>(row.squares / norm.size);
        }
        channels[c] = channel_of(norm, c, mean[c], var[c]);
      },
      [&](int64_t c, int64_t at, int64_t n) {
        const int64_t i = c * norm.size + at;
        if (residual) added(x + i, residual + i, n, channels[c], stream, y + i);
        else alone(x + i, nullptr, n, channels[c], stream, y + i);
      });
}

template <class T, class R>
void update_running(int64_t channels, int64_t size, const T* mean, const T* var, double step, R* running_mean,
                    R* running_var) {
  const T unbiased = static_cast<T>(double(size) / std::max<int64_t>(size - 1, 1));
  const R weight = static_cast<R>(step);
  const auto move = [&](R& running, R to) {
    const bool small = std::abs(weight) < R(0.5);
    running = std::fma(small ? weight : weight - 1, to - running, small ? running : to);
  };
  for (int64_t c = 0; c < channels; ++c) {
    move(running_mean[c], static_cast<R>(mean[c]));
    move(running_var[c], static_cast<R>(T(var[c] * unbiased)));
  }
}

template <class T>
void batch_norm_gradients(const BatchNorm<T>& norm, const T* grad, const T* x, const T* y, const T* mean, const T* var,
                          bool training, T* grad_x, T* grad_residual, T* grad_weight, T* grad_bias) {
  const auto run = !norm.relu ? gradients<T, Relu::none> : y ? gradients<T, Relu::of_y> : gradients<T, Relu::of_x>;
  run(norm, grad, x, y, mean, var, training, grad_x, grad_residual, grad_weight, grad_bias);
}

#define EXSSNET_INSTANTIATE(T)                                                                                        \
  template void batch_norm(const BatchNorm<T>&, const T*, const T*, bool, T*, T*, T*);                                \
  template void batch_norm_gradients(const BatchNorm<T>&, const T*, const T*, const T*, const T*, const T*, bool, T*, \
                                     T*, T*, T*);
EXSSNET_INSTANTIATE(float)
EXSSNET_INSTANTIATE(double)
template void update_running(int64_t, int64_t, const float*, const float*, double, float*, float*);
template void update_running(int64_t, int64_t, const double*, const double*, double, double*, double*);
template void update_running(int64_t, int64_t, const double*, const double*, double, float*, float*);
template void update_running(int64_t, int64_t, const float*, const float*, double, double*, double*);

}  // namespace exssnet::cpu
