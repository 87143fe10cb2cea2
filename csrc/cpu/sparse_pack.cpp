// Images into the packed layout of cpu/sparse.h, and back.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/sparse.h"

namespace exssnet::cpu {

namespace {
constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread
}  // namespace

template <class T>
void pack(const T* x, const Strides& strides, const PackedImage& image, T* packed) {
  const auto& [batch, channels, h, w] = image;
  const int64_t lines = h.phases * h.length;
  std::fill_n(packed + image.size(), PackedImage::kSlack, T(0));
  // Channels inside lines: what a line needs of all channels is near, however the channels are stored.
  parallel_for(lines * channels, kGrain / (w.phases * image.line() + 1) + 1, [&](int64_t begin, int64_t end) {
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
  parallel_for(channels, kGrain / (plane + 1) + 1, [&](int64_t begin, int64_t end) {
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

template void pack(const float*, const Strides&, const PackedImage&, float*);
template void pack(const double*, const Strides&, const PackedImage&, double*);
template void unpack(const float*, const PackedImage&, float*);
template void unpack(const double*, const PackedImage&, double*);

}  // namespace exssnet::cpu
