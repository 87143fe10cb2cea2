#include "cpu/sparse.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {

constexpr int64_t kChunk = 1024;          // bytes of an output line that are taken at a time
constexpr int64_t kGrain = 1 << 17;       // multiply-adds that are worth a thread
constexpr int64_t kCopyGrain = 1 << 15;   // elements likewise
constexpr int64_t kEntriesPerBlock = 16;  // of a row: fewer, and reloading the sums costs more than a nearer cache gains

// A pattern in the order in which the loops read it. Rows are cut into blocks of columns.
template <class T>
struct Walk {
  int64_t rows = 0, blocks = 1;
  std::vector<int64_t> start;          // (rows, blocks + 1): the entries of a row's block
  std::unique_ptr<int64_t[]> offset;   // into the packed image
  std::unique_ptr<T[]> value;          // for products
  std::unique_ptr<int32_t[]> slot;     // for value gradients, where only free entries are walked
};

namespace baseline {
constexpr int kVectorBytes = 16, kVectors = 8;
#include "cpu/sparse_body.h"
}  // namespace baseline
#if EXSSNET_X86
EXSSNET_AVX2_BEGIN
namespace avx2 {
constexpr int kVectorBytes = 32, kVectors = 8;
#include "cpu/sparse_body.h"
}  // namespace avx2
EXSSNET_TARGET_END
EXSSNET_AVX512_BEGIN
namespace avx512 {
constexpr int kVectorBytes = 64, kVectors = 16;
#include "cpu/sparse_body.h"
}  // namespace avx512
EXSSNET_TARGET_END
#endif

// What a walk is made of. Row r consists of the pattern's rows source[first[r]] ... source[first[r + 1] - 1]; their
// entries are read `shift` further in the image than place[index].
struct Source {
  int64_t row, shift;
};
struct Plan {
  std::vector<int64_t> first, place;
  std::vector<Source> source;
  int64_t rows() const { return first.size() - 1; }
};

// Row o is the pattern's row; column (channel, r, s) has its place in the packed input.
Plan plan_rows(const Convolution& c) {
  const PackedImage x = packed_input(c);
  Plan plan;
  for (int64_t o = 0; o <= c.out_channels; ++o) plan.first.push_back(o);
  for (int64_t o = 0; o < c.out_channels; ++o) plan.source.push_back({o, 0});
  for (int64_t channel = 0; channel < c.in_channels; ++channel)
    for (int64_t r = 0; r < c.h.taps; ++r)
      for (int64_t s = 0; s < c.w.taps; ++s)
        plan.place.push_back(channel * x.channel() + (c.h.phase(r) * x.w.phases + c.w.phase(s)) * x.plane() +
                             c.h.shift(r) * x.line() + c.w.shift(s) * c.batch);
  return plan;
}

// Row (channel, phase of h, phase of w) takes the columns of those taps that hit the phase.
Plan plan_columns(const Convolution& c) {
  const PackedImage grad = packed_output_gradient(c);
  const int64_t down = c.h.phases(), across = c.w.phases();
  Plan plan{.first = {0}, .place = {}, .source = {}};
  for (int64_t row = 0; row < c.in_channels * down * across; ++row) {
    for (int64_t r = row / across % down; r < c.h.taps; r += down)
      for (int64_t s = row % across; s < c.w.taps; s += across)
        plan.source.push_back(
            {(row / (down * across) * c.h.taps + r) * c.w.taps + s,
             (c.h.reach() - c.h.shift(r)) * grad.line() + (c.w.reach() - c.w.shift(s)) * c.batch});
    plan.first.push_back(plan.source.size());
  }
  for (int64_t o = 0; o < c.out_channels; ++o) plan.place.push_back(o * grad.channel());
  return plan;
}

// Without values, only the entries of free values are walked.
template <class T>
Walk<T> make_walk(const Plan& plan, const Pattern& pattern, const Values<T>* values, int64_t free_count) {
  Walk<T> walk;
  walk.rows = plan.rows();
  walk.blocks = std::clamp<int64_t>(pattern.entries / std::max<int64_t>(1, walk.rows * kEntriesPerBlock), 1,
                                    std::max<int64_t>(1, pattern.columns));
  walk.start.resize(walk.rows * (walk.blocks + 1));
  walk.offset.reset(new int64_t[pattern.entries]);
  if (values)
    walk.value.reset(new T[pattern.entries]);
  else
    walk.slot.reset(new int32_t[pattern.entries]);
  int64_t entries = 0;
  for (int64_t r = 0; r < walk.rows; ++r) {
    walk.start[r * (walk.blocks + 1)] = entries;
    for (int64_t i = plan.first[r]; i < plan.first[r + 1]; ++i)
      entries += pattern.ptr[plan.source[i].row + 1] - pattern.ptr[plan.source[i].row];
  }
  const int64_t width = (pattern.columns + walk.blocks - 1) / walk.blocks;
  const int64_t grain = kCopyGrain * walk.rows / std::max<int64_t>(1, pattern.entries) + 1;
  parallel_for(walk.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> next;  // unread entry of each source
    for (int64_t r = begin; r < end; ++r) {
      const Source* source = &plan.source[plan.first[r]];
      const int64_t sources = plan.first[r + 1] - plan.first[r];
      next.clear();
      for (int64_t i = 0; i < sources; ++i) next.push_back(pattern.ptr[source[i].row]);
      int64_t* start = &walk.start[r * (walk.blocks + 1)];
      int64_t at = start[0];
      for (int64_t block = 1; block <= walk.blocks; ++block) {
        const int64_t bound = block == walk.blocks ? pattern.columns : block * width;
        for (int64_t i = 0; i < sources; ++i) {
          int64_t k = next[i];
          for (; k < pattern.ptr[source[i].row + 1] && pattern.index[k] < bound; ++k) {
            const int32_t slot = pattern.slot[k];
            if (!values && slot >= free_count) continue;
            walk.offset[at] = source[i].shift + plan.place[pattern.index[k]];
            if (values)
              walk.value[at++] = slot < free_count ? values->free[slot] : values->frozen[slot - free_count];
            else
              walk.slot[at++] = slot;
          }
          next[i] = k;
        }
        start[block] = at;
      }
    }
  });
  return walk;
}

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
  std::atomic<bool> good = true;
  parallel_for(pattern.entries, kCopyGrain, [&](int64_t begin, int64_t end) {
    int32_t low = 0, index = 0, slot = 0;
    for (int64_t k = begin; k < end; ++k) {
      low = std::min({low, pattern.index[k], pattern.slot[k]});
      index = std::max(index, pattern.index[k]);
      slot = std::max(slot, pattern.slot[k]);
    }
    if (low < 0 || index >= pattern.columns || slot >= slots) good = false;
  });
  return good;
}

template <class T>
void pack(const T* x, const Strides& strides, const PackedImage& image, T* packed) {
  const auto& [batch, channels, h, w] = image;
  const int64_t lines = h.phases * h.length;
  std::fill_n(packed + image.size(), PackedImage::kSlack, T(0));
  // Channels inside lines: what a line needs of all channels is near, however the channels are stored.
  parallel_for(lines * channels, kCopyGrain / (w.phases * image.line() + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % channels, h_phase = i / channels / h.length, position = i / channels % h.length;
      const int64_t row = h.pixel(h_phase, position);
      for (int64_t w_phase = 0; w_phase < w.phases; ++w_phase) {
        T* to = packed + channel * image.channel() + (h_phase * w.phases + w_phase) * image.plane() +
                position * image.line();
        // Positions [first, last) are inside of the image.
        const int64_t origin = w.pixel(w_phase, 0);
        int64_t first = std::min(w.length, origin < 0 ? (-origin + w.stride - 1) / w.stride : 0);
        int64_t last = std::clamp((w.size - 1 - origin + w.stride) / w.stride, first, w.length);
        if (row < 0 || row >= h.size) first = last = 0;
        const T* from = x + channel * strides.c + row * strides.h + origin * strides.w;
        const int64_t step = w.stride * strides.w;
        std::fill(to, to + first * batch, T(0));
        if (strides.n == 1 && step == batch)
          std::copy(from + first * step, from + last * step, to + first * batch);
        else if (strides.n == 1)
          for (int64_t q = first; q < last; ++q) std::copy_n(from + q * step, batch, to + q * batch);
        else
          for (int64_t n = 0; n < batch; n += 8)  // few enough cache lines to be found again for the next pixel
            for (int64_t q = first; q < last; ++q)
              for (int64_t j = n; j < std::min(batch, n + 8); ++j) to[q * batch + j] = from[j * strides.n + q * step];
        std::fill(to + last * batch, to + w.length * batch, T(0));
      }
    }
  });
}

template <class T>
void unpack(const T* packed, const PackedImage& image, T* x) {
  const auto& [batch, channels, h, w] = image;
  const bool holes = h.phases < h.stride || w.phases < w.stride;
  const int64_t plane = h.size * w.size * batch;
  parallel_for(channels, kCopyGrain / (plane + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      T* to = x + channel * plane;
      if (holes) std::fill_n(to, plane, T(0));
      const T* from = packed + channel * image.channel();
      for (int64_t a = 0; a < h.phases; ++a)
        for (int64_t b = 0; b < w.phases; ++b)
          for (int64_t i = 0; i < h.length; ++i)
            for (int64_t j = 0; j < w.length; ++j, from += batch) {
              const int64_t row = h.pixel(a, i), column = w.pixel(b, j);
              if (row >= 0 && row < h.size && column >= 0 && column < w.size)
                std::copy_n(from, batch, to + (row * w.size + column) * batch);
            }
    }
  });
}

template <class T>
void sparse_forward(const Convolution& c, const Pattern& by_rows, const Values<T>& values, const T* bias,
                    const T* packed_x, T* y) {
  const PackedImage image = packed_input(c);
  const Walk<T> walk = make_walk(plan_rows(c), by_rows, &values, values.free_count);
  const int64_t width = c.w.out * c.batch;
  multiply(walk, {c.h.out, width, image.line(), width}, packed_x, bias, y, c.h.out * width);
}

template <class T>
void sparse_input_gradient(const Convolution& c, const Pattern& by_columns, const Values<T>& values,
                           const T* packed_grad, T* grad_x) {
  const PackedImage image = packed_input_gradient(c);
  const Walk<T> walk = make_walk(plan_columns(c), by_columns, &values, values.free_count);
  multiply<T>(walk, {image.h.length, image.line(), packed_output_gradient(c).line(), image.line()}, packed_grad, nullptr,
              grad_x, image.plane());
}

template <class T>
void sparse_value_gradient(const Convolution& c, const Pattern& by_rows, int64_t free_count, const T* packed_x,
                           const T* grad, T* grad_values) {
  std::fill_n(grad_values, free_count, T(0));
  const Walk<T> walk = make_walk<T>(plan_rows(c), by_rows, nullptr, free_count);
  const int64_t width = c.w.out * c.batch, plane = c.h.out * width;
  const Lines lines(c.h.out, width, packed_input(c).line(), width);
  const int64_t parts = std::clamp(by_rows.entries * plane / kGrain + 1, int64_t(1), max_threads());
  const std::vector<int64_t> first = share_rows(walk, parts);
  const auto rows = EXSSNET_PICK(sample_rows<T>);
  constexpr int64_t chunk = kChunk / sizeof(T);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t line = 0; line < lines.count; ++line)
      for (int64_t at = 0; at < lines.width; at += chunk)
        rows(walk, first[begin], first[end], packed_x + line * lines.x_step + at, grad + line * lines.y_step + at, plane,
             std::min(chunk, lines.width - at), grad_values);
  });
}

template void pack(const float*, const Strides&, const PackedImage&, float*);
template void pack(const double*, const Strides&, const PackedImage&, double*);
template void unpack(const float*, const PackedImage&, float*);
template void unpack(const double*, const PackedImage&, double*);
template void sparse_forward(const Convolution&, const Pattern&, const Values<float>&, const float*, const float*, float*);
template void sparse_forward(const Convolution&, const Pattern&, const Values<double>&, const double*, const double*,
                             double*);
template void sparse_input_gradient(const Convolution&, const Pattern&, const Values<float>&, const float*, float*);
template void sparse_input_gradient(const Convolution&, const Pattern&, const Values<double>&, const double*, double*);
template void sparse_value_gradient(const Convolution&, const Pattern&, int64_t, const float*, const float*, float*);
template void sparse_value_gradient(const Convolution&, const Pattern&, int64_t, const double*, const double*, double*);

}  // namespace exssnet::cpu
