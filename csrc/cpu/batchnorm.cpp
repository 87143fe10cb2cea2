#include "cpu/batchnorm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/streaming.h"

namespace exssnet::cpu {

namespace {

constexpr int64_t kChunkBytes = 16384;  // part of a row that is summed at a time: half of an L1 cache
constexpr int64_t kGrain = 1 << 15;     // elements per thread, at least
// For channels_last images. Their chunks have at least kPixels pixels, so that merging sums costs little.
constexpr int64_t kLanes = 16, kPixels = 64, kParts = 32;

struct Moments {
  double count, mean, squares;  // squares: the sum of squared deviations from the mean
};

struct Sums {
  double grad, product;  // sums of grad and of grad * (x - mean)
};

template <class T>
struct Channel {
  static constexpr int64_t period = std::numeric_limits<int64_t>::max();  // of a chunk's channels: all are this one
  T mean, scale, shift, offset, slope;
};

// The numbers of the channels that a chunk of channels_last images has in turn. A period is all channels, so many times
// that vectors fill it.
template <class T>
struct Turns {
  int64_t period;
  const T *mean, *scale, *shift, *offset, *slope;
};

enum class Relu { none, of_x, of_y };  // the tensor that shows where the input of ReLU was positive

// Moments of the union of two sets (Chan, Golub & LeVeque 1979).
Moments merged(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  const double count = a.count + b.count, step = b.mean - a.mean;
  return {count, a.mean + step * b.count / count, a.squares + b.squares + step * step * a.count * b.count / count};
}

#define EXSSNET_BODY "cpu/batchnorm_body.h"
#include "cpu/each_isa.h"

template <class T>
Channel<T> channel_of(const BatchNorm<T>& norm, int64_t c, T mean, T var) {
  const double scale = (norm.weight ? norm.weight[c] : 1) / std::sqrt(double(var) + norm.eps);
  return {mean, static_cast<T>(scale), norm.bias ? norm.bias[c] : T(0), 0, 0};
}

// Whether the result may be streamed (see streaming.h): all rows must be aligned to vectors.
template <class S>
bool streams(const BatchNorm<Wide<S>>& norm, const S* result) {
  const int64_t row_bytes = norm.size * sizeof(S);
  const bool aligned = norm.channels_last || row_bytes % kStreamAlignment == 0;
  return aligned && is_streamed(result, norm.channels * row_bytes);
}

// For every channel: measure(channel, at, n, part) for each chunk of its row, then finish(c, parts, their number), then
// apply(channel, at, n) for each chunk. If one thread processes the whole row, the row stays in its cache. The chunks
// and the order of the parts do not depend on the number of threads.
template <class S, class Part, class T, class Measure, class Finish, class Apply>
void by_rows(const BatchNorm<T>& norm, std::vector<Channel<T>>& channels, const Measure& measure, const Finish& finish,
             const Apply& apply) {
  constexpr int64_t kChunk = kChunkBytes / sizeof(S);
  const int64_t chunks = (norm.size + kChunk - 1) / kChunk, threads = max_threads();
  const auto length = [&](int64_t chunk) { return std::min(kChunk, norm.size - chunk * kChunk); };
  const auto start = [&](int64_t c, int64_t chunk) { return c * norm.size + chunk * kChunk; };
  if (threads == 1 || chunks <= 1 || norm.channels >= 4 * threads) {
    parallel_for(norm.channels, kGrain / std::max<int64_t>(norm.size, 1) + 1, [&](int64_t begin, int64_t end) {
      std::vector<Part> parts(chunks);
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t i = 0; i < chunks; ++i) measure(channels[c], start(c, i), length(i), &parts[i]);
        finish(c, parts.data(), chunks);
        for (int64_t i = 0; i < chunks; ++i) apply(channels[c], start(c, i), length(i));
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
  for_chunks([&](int64_t i, int64_t c, int64_t chunk) {
    measure(channels[c], start(c, chunk), length(chunk), &parts[i]);
  });
  for (int64_t c = 0; c < norm.channels; ++c) finish(c, parts.data() + c * chunks, chunks);
  for_chunks([&](int64_t, int64_t c, int64_t chunk) { apply(channels[c], start(c, chunk), length(chunk)); });
}

// The same for channels_last images: measure(turns, at, n, part) adds to one part for each number of the period, for
// consecutive chunks.
template <class S, class Part, class T, class Measure, class Finish, class Apply>
void by_turns(const BatchNorm<T>& norm, std::vector<Channel<T>>& channels, const Measure& measure, const Finish& finish,
              const Apply& apply) {
  const int64_t count = norm.channels, total = count * norm.size, period = std::lcm(count, kLanes);
  const int64_t least = std::max<int64_t>(kPixels * count, kChunkBytes / sizeof(S));
  const int64_t size = (least + period - 1) / std::max<int64_t>(period, 1) * period;
  const int64_t chunks = total ? (total + size - 1) / size : 0, splits = std::min(chunks, kParts);
  const auto length = [&](int64_t chunk) { return std::min(size, total - chunk * size); };
  std::vector<T> numbers(5 * period);
  T* const to = numbers.data();
  const Turns<T> turns{period, to, to + period, to + 2 * period, to + 3 * period, to + 4 * period};
  const auto spread = [&] {
    for (int64_t i = 0; i < period; ++i) {
      const Channel<T>& c = channels[i % count];
      const T values[] = {c.mean, c.scale, c.shift, c.offset, c.slope};
      for (int64_t k = 0; k < 5; ++k) to[k * period + i] = values[k];
    }
  };
  spread();
  std::vector<Part> parts(splits * period);
  parallel_for(splits, kGrain * splits / std::max<int64_t>(total, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t split = begin; split < end; ++split)
      for (int64_t i = split * chunks / splits; i < (split + 1) * chunks / splits; ++i)
        measure(turns, i * size, length(i), parts.data() + split * period);
  });
  std::vector<Part> own;
  for (int64_t c = 0; c < count; ++c) {
    own.clear();
    for (size_t i = c; i < parts.size(); i += count) own.push_back(parts[i]);
    finish(c, own.data(), static_cast<int64_t>(own.size()));
  }
  spread();
  parallel_for(chunks, kGrain / std::max<int64_t>(size, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) apply(turns, i * size, length(i));
    finish_streams();
  });
}

template <class S, class Part, class T, class... Passes>
void in_two_passes(const BatchNorm<T>& norm, std::vector<Channel<T>>& channels, const Passes&... passes) {
  if (norm.channels_last) by_turns<S, Part>(norm, channels, passes...);
  else by_rows<S, Part>(norm, channels, passes...);
}

template <class S, Relu relu>
void gradients(const BatchNorm<Wide<S>>& norm, const S* grad, const S* x, const S* y, const Wide<S>* mean,
               const Wide<S>* var, bool training, S* grad_x, S* kept, Wide<S>* grad_weight, Wide<S>* grad_bias) {
  using T = Wide<S>;
  const bool stream = streams(norm, grad_x);
  const bool need_sums = training || kept || grad_weight || grad_bias;
  std::vector<Channel<T>> channels(norm.channels);
  for (int64_t c = 0; c < norm.channels; ++c) channels[c] = channel_of(norm, c, mean[c], var[c]);
  in_two_passes<S, Sums>(
      norm, channels,
      [&]<class Of>(const Of& of, int64_t i, int64_t n, Sums* to) {
        const auto sums =
            kept ? EXSSNET_PICK(gradient_sums<S, relu, true, Of>) : EXSSNET_PICK(gradient_sums<S, relu, false, Of>);
        if (need_sums) sums(grad + i, x + i, y ? y + i : y, n, of, kept ? kept + i : kept, to);
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
      [&]<class Of>(const Of& of, int64_t i, int64_t n) {
        const auto from_grad = training ? EXSSNET_PICK(input_gradient<S, relu, true, Of>)
                                        : EXSSNET_PICK(input_gradient<S, relu, false, Of>);
        const auto from_kept = training ? EXSSNET_PICK(input_gradient<S, Relu::none, true, Of>)
                                        : EXSSNET_PICK(input_gradient<S, Relu::none, false, Of>);
        if (grad_x && kept) from_kept(kept + i, x + i, nullptr, n, of, stream, grad_x + i);
        else if (grad_x) from_grad(grad + i, x + i, y ? y + i : y, n, of, stream, grad_x + i);
      });
}

}  // namespace

template <class S>
void batch_norm(const BatchNorm<Wide<S>>& norm, const S* x, const S* residual, bool given, Wide<S>* mean, Wide<S>* var,
                S* y) {
  using T = Wide<S>;
  const bool stream = streams(norm, y);
  std::vector<Channel<T>> channels(norm.channels);
  in_two_passes<S, Moments>(
      norm, channels,
      [&]<class Of>(const Of& of, int64_t i, int64_t n, Moments* to) {
        if (!given) EXSSNET_PICK(moments<S, Of>)(x + i, n, of, to);
      },
      [&](int64_t c, const Moments* parts, int64_t count) {
        if (!given) {
          Moments all = count ? parts[0] : Moments{};
          for (int64_t i = 1; i < count; ++i) all = merged(all, parts[i]);
          mean[c] = static_cast<T>(count ? all.mean : NAN);
          var[c] = static_cast<T>(all.squares / norm.size);
        }
        channels[c] = channel_of(norm, c, mean[c], var[c]);
      },
      [&]<class Of>(const Of& of, int64_t i, int64_t n) {
        const auto added = norm.relu ? EXSSNET_PICK(normalise<S, true, true, Of>)
                                     : EXSSNET_PICK(normalise<S, true, false, Of>);
        const auto alone = norm.relu ? EXSSNET_PICK(normalise<S, false, true, Of>)
                                     : EXSSNET_PICK(normalise<S, false, false, Of>);
        if (residual) added(x + i, residual + i, n, of, stream, y + i);
        else alone(x + i, nullptr, n, of, stream, y + i);
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

template <class S>
void batch_norm_gradients(const BatchNorm<Wide<S>>& norm, const S* grad, const S* x, const S* y, const Wide<S>* mean,
                          const Wide<S>* var, bool training, S* grad_x, S* grad_residual, Wide<S>* grad_weight,
                          Wide<S>* grad_bias) {
  const auto run = !norm.relu ? gradients<S, Relu::none> : y ? gradients<S, Relu::of_y> : gradients<S, Relu::of_x>;
  run(norm, grad, x, y, mean, var, training, grad_x, grad_residual, grad_weight, grad_bias);
}

#define EXSSNET_INSTANTIATE(S)                                                                                         \
  template void batch_norm(const BatchNorm<Wide<S>>&, const S*, const S*, bool, Wide<S>*, Wide<S>*, S*);               \
  template void batch_norm_gradients(const BatchNorm<Wide<S>>&, const S*, const S*, const S*, const Wide<S>*,          \
                                     const Wide<S>*, bool, S*, S*, Wide<S>*, Wide<S>*);
EXSSNET_INSTANTIATE(BFloat16)
EXSSNET_INSTANTIATE(float)
EXSSNET_INSTANTIATE(double)
template void update_running(int64_t, int64_t, const float*, const float*, double, float*, float*);
template void update_running(int64_t, int64_t, const double*, const double*, double, double*, double*);
template void update_running(int64_t, int64_t, const double*, const double*, double, float*, float*);
template void update_running(int64_t, int64_t, const float*, const float*, double, double*, double*);

}  // namespace exssnet::cpu
