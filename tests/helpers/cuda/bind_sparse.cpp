// csrc/cuda/sparse over NumPy arrays.
#include "cuda/sparse.h"

#include <pybind11/stl.h>

#include "arrays.h"

using namespace exssnet;

namespace {

using Ints = std::vector<int64_t>;

// shape: batch, in and out channels; height and width as {in, out, taps, stride, padding, dilation}.
Convolution convolution(const Ints& shape, const Ints& height, const Ints& width) {
  const auto window = [](const Ints& v) { return Window{v[0], v[1], v[2], v[3], v[4], v[5]}; };
  return {shape[0], shape[1], shape[2], window(height), window(width)};
}

Pattern pattern_of(const std::vector<py::array>& arrays, int64_t columns) {
  return {data<int32_t>(arrays[0]), data<int32_t>(arrays[1]), data<int32_t>(arrays[2]), arrays[0].size() - 1, columns,
          arrays[1].size()};
}

const void* memory(const std::optional<py::array>& array) { return array ? array->data() : nullptr; }

}  // namespace

// Values and images as unsigned integers of their size, dtypes as the number of their Float.
PYBIND11_MODULE(sparse_emulated, m) {
  // y from x, or, transposed, grad_x from grad.
  m.def("product", [](const Ints& shape, const Ints& height, const Ints& width, bool transposed,
                      const std::vector<py::array>& pattern, const py::array& free, const py::array& frozen,
                      const std::optional<py::array>& scale, const std::optional<py::array>& bias,
                      const std::optional<py::array>& residual, bool relu, int dtype, const py::array& x,
                      const py::array& y, int processors) {
    const auto c = convolution(shape, height, width);
    const int64_t columns = (transposed ? c.out_channels : c.in_channels) * c.h.taps * c.w.taps;
    const cuda::SparseValues values{free.data(), frozen.data(), free.size(), free.size() + frozen.size()};
    const auto p = pattern_of(pattern, columns);
    const auto type = static_cast<Float>(dtype);
    void* const to = const_cast<void*>(y.data());
    const cuda::SparseEpilogue then{memory(scale), memory(bias), memory(residual), relu};
    check(transposed ? cuda::sparse_input_gradient(c, p, values, type, x.data(), to, processors, nullptr)
                     : cuda::sparse_forward(c, p, values, then, type, x.data(), to, processors, nullptr));
  });
  m.def("workspace_bytes", [](const Ints& shape, const Ints& height, const Ints& width,
                              const std::vector<py::array>& pattern, int64_t free_count, int dtype) {
    const auto c = convolution(shape, height, width);
    return cuda::sparse_workspace_bytes(c, pattern_of(pattern, c.in_channels * c.h.taps * c.w.taps), free_count,
                                        static_cast<Float>(dtype));
  });
  // Returns the number of launches.
  m.def("value_gradient", [](const Ints& shape, const Ints& height, const Ints& width,
                             const std::vector<py::array>& pattern, int dtype, const py::array& x,
                             const py::array& grad, const py::array& grad_values, const py::array& workspace) {
    const int64_t before = emulator::launches;
    const auto c = convolution(shape, height, width);
    check(cuda::sparse_value_gradient(c, pattern_of(pattern, c.in_channels * c.h.taps * c.w.taps), grad_values.size(),
                                      static_cast<Float>(dtype), x.data(), grad.data(),
                                      const_cast<void*>(grad_values.data()), data<uint8_t>(workspace), nullptr));
    return emulator::launches - before;
  });
}
