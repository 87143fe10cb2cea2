#include "cpu/layout.h"

#include <algorithm>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace exssnet::cpu {

namespace {
constexpr int64_t kGrain = 1 << 15;  // elements per thread, at least

#define EXSSNET_BODY "cpu/layout_body.h"
#include "cpu/each_isa.h"
}  // namespace

template <class T>
void batch_innermost(const T* x, const Strides& strides, int64_t n, int64_t c, int64_t h, int64_t w, T* to) {
  // The loop over channels is inside the loop over rows, so that memory accesses are near for every order of channels.
  parallel_for(h * c, kGrain / (w * n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % c, row = i / c;
      const T* from = x + channel * strides.c + row * strides.h;
      T* line = to + (channel * h + row) * w * n;
      if (strides.n == 1) {
        for (int64_t q = 0; q < w; ++q) std::copy_n(from + q * strides.w, n, line + q * n);
      } else if (strides.w == 1) {
        EXSSNET_PICK(transpose<T>)(from, strides.n, n, w, line, n);
      } else {
        for (int64_t image = 0; image < n; image += 8)  // few cache lines, so that they stay cached for the next pixel
          for (int64_t q = 0; q < w; ++q)
            for (int64_t j = image; j < std::min(n, image + 8); ++j) line[q * n + j] = from[j * strides.n + q * strides.w];
      }
    }
  });
}

template <class F, class T>
void channels_innermost(const F* x, int64_t c, int64_t pixels, int64_t n, T* to) {
  parallel_for(pixels, kGrain / (c * n + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel)
      EXSSNET_PICK(transpose<T, F>)(x + pixel * n, pixels * n, c, n, to + pixel * c, pixels * c);
  });
}

template void batch_innermost(const uint16_t*, const Strides&, int64_t, int64_t, int64_t, int64_t, uint16_t*);
template void batch_innermost(const float*, const Strides&, int64_t, int64_t, int64_t, int64_t, float*);
template void batch_innermost(const double*, const Strides&, int64_t, int64_t, int64_t, int64_t, double*);
template void channels_innermost(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*);
template void channels_innermost(const BFloat16*, int64_t, int64_t, int64_t, float*);
template void channels_innermost(const float*, int64_t, int64_t, int64_t, float*);
template void channels_innermost(const double*, int64_t, int64_t, int64_t, double*);

}  // namespace exssnet::cpu
