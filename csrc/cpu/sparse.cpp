#include "cpu/sparse.h"

#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/sparse_walk.h"

namespace exssnet::cpu {

namespace {

constexpr int64_t kChunk = 1024;     // bytes of an output line that are taken at a time
constexpr int64_t kGrain = 1 << 17;  // multiply-adds that are worth a thread

#define EXSSNET_BODY "cpu/sparse_body.h"
#include "cpu/each_isa.h"

// First rows of `parts` shares of about equally many entries.
template <class T>
std::vector<int64_t> share_rows(const Walk<T>& walk, int64_t parts) {
  std::vector<int64_t> first(parts + 1, walk.rows);
  const auto entry = [&](int64_t row) { return walk.start[row * (walk.blocks + 1)] + row; };  // a row costs one too
  const int64_t total = walk.rows ? walk.start.back() + walk.rows : 0;
  int64_t row = 0;
  for (int64_t part = 0; part < parts; ++part) {
    while (row < walk.rows && entry(row) < total * part / parts) ++row;
    first[part] = row;
  }
  return first;
}

// Lines of a product, and how far apart they are in its two images. Lines without a gap between them are joined.
struct Lines {
  int64_t count, width, x_step, y_step;

  Lines(int64_t count, int64_t width, int64_t x_step, int64_t y_step)
      : count(count), width(width), x_step(x_step), y_step(y_step) {
    if (x_step == width && y_step == width) this->width *= std::exchange(this->count, 1);
  }
};

// y = walk * x. All rows pass over one chunk of pixels before the next chunk is taken.
template <class T>
void multiply(const Walk<T>& walk, const Lines& lines, const T* x, const T* bias, T* y, int64_t y_plane) {
  if (lines.count * lines.width * walk.rows == 0) return;
  constexpr int64_t chunk = kChunk / sizeof(T);
  const int64_t chunks = (lines.width + chunk - 1) / chunk, tasks = lines.count * chunks;
  const int64_t work = (walk.start.back() + walk.rows) * std::min(chunk, lines.width);
  const int64_t wanted = std::min(max_threads(), tasks * work / kGrain + 1);
  const int64_t parts = std::min(walk.rows, tasks >= 4 * wanted || wanted == 1 ? 1 : (2 * wanted + tasks - 1) / tasks);
  const std::vector<int64_t> first = share_rows(walk, parts);
  const auto rows = EXSSNET_PICK(multiply_rows<T>);
  parallel_for(parts * tasks, kGrain * parts / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / tasks, line = i % tasks / chunks, at = i % chunks * chunk;
      rows(walk, first[part], first[part + 1], x + line * lines.x_step + at, bias, y + line * lines.y_step + at, y_plane,
           std::min(chunk, lines.width - at));
    }
  });
}

}  // namespace

bool in_range(const Pattern& pattern, int64_t slots) {
  if (pattern.ptr[0] != 0 || pattern.ptr[pattern.rows] != pattern.entries) return false;
  for (int64_t row = 0; row < pattern.rows; ++row)
    if (pattern.ptr[row] > pattern.ptr[row + 1]) return false;
  // i lies in [0, n) when neither i nor n - 1 - i is negative.
  constexpr int64_t most = int64_t(1) << 31;
  const uint32_t last_column = std::min(pattern.columns, most) - 1, last_slot = std::min(slots, most) - 1;
  std::atomic<bool> good = true;
  parallel_for(pattern.entries, kGrain / 4, [&](int64_t begin, int64_t end) {
    uint32_t sign = 0;
    for (int64_t k = begin; k < end; ++k) {
      const uint32_t index = pattern.index[k], slot = pattern.slot[k];
      sign |= index | (last_column - index) | slot | (last_slot - slot);
    }
    if (sign >> 31) good = false;
  });
  return good;
}

template <class T>
void sparse_forward(const Convolution& c, const Pattern& by_rows, const Values<T>& values, const T* bias,
                    const T* packed_x, T* y) {
  const PackedImage image = packed_input(c);
  const Walk<T> walk = make_walk<false>(plan_rows(c), by_rows, values);
  const int64_t width = c.w.out * c.batch;
  multiply(walk, {c.h.out, width, image.line(), width}, packed_x, bias, y, c.h.out * width);
}

template <class T>
void sparse_input_gradient(const Convolution& c, const Pattern& by_columns, const Values<T>& values,
                           const T* packed_grad, T* grad_x) {
  const PackedImage image = packed_input_gradient(c);
  const Walk<T> walk = make_walk<false>(plan_columns(c), by_columns, values);
  multiply<T>(walk, {image.h.length, image.line(), packed_output_gradient(c).line(), image.line()}, packed_grad, nullptr,
              grad_x, image.plane());
}

template <class T>
void sparse_value_gradient(const Convolution& c, const Pattern& by_rows, int64_t free_count, const T* packed_x,
                           const T* grad, T* grad_values) {
  const Walk<T> walk = make_walk<true>(plan_rows(c), by_rows, Values<T>{nullptr, nullptr, free_count});
  const int64_t width = c.w.out * c.batch, plane = c.h.out * width;
  const Lines lines(c.h.out, width, packed_input(c).line(), width);
  const int64_t parts = std::clamp(by_rows.entries * plane / kGrain + 1, int64_t(1), max_threads());
  const std::vector<int64_t> first = share_rows(walk, parts);
  const auto rows = EXSSNET_PICK(sample_rows<T>);
  constexpr int64_t chunk = kChunk / sizeof(T);
  std::fill_n(grad_values, free_count, T(0));
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = 0; line < lines.count; ++line)
      for (int64_t at = 0; at < lines.width; at += chunk)
        rows(walk, first[begin], first[end], packed_x + line * lines.x_step + at, grad + line * lines.y_step + at, plane,
             std::min(chunk, lines.width - at));
    for (int64_t row = first[begin]; row < first[end]; ++row)
      for (int64_t k = walk.start[row * (walk.blocks + 1)]; k < walk.start[(row + 1) * (walk.blocks + 1) - 1]; ++k)
        grad_values[walk.slot[k]] = walk.value[k];
  });
}

template void sparse_forward(const Convolution&, const Pattern&, const Values<float>&, const float*, const float*, float*);
template void sparse_forward(const Convolution&, const Pattern&, const Values<double>&, const double*, const double*,
                             double*);
template void sparse_input_gradient(const Convolution&, const Pattern&, const Values<float>&, const float*, float*);
template void sparse_input_gradient(const Convolution&, const Pattern&, const Values<double>&, const double*, double*);
template void sparse_value_gradient(const Convolution&, const Pattern&, int64_t, const float*, const float*, float*);
template void sparse_value_gradient(const Convolution&, const Pattern&, int64_t, const double*, const double*, double*);

}  // namespace exssnet::cpu
