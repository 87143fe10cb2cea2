// The planted kernels, and the emulator's types, over NumPy arrays.
#include <pybind11/stl.h>

#include "arrays.h"
#include "planted.h"

PYBIND11_MODULE(planted_emulated, m) {
  m.def("names", &planted::names);
  m.def("run", [](const std::string& name, bool right, const py::array& x, const py::array& y) {
    check(planted::run(name, right, data<float>(x), static_cast<int>(x.size()), data<float>(y), nullptr));
  });
  m.def("launch_nothing", [](int64_t grid, int block, size_t shared_bytes, int allowed_bytes) {
    check(planted::launch_nothing(grid, block, shared_bytes, allowed_bytes, nullptr));
  });
  m.def("to_half", [](const py::array& x, const py::array& bits) {
    for (py::ssize_t i = 0; i < x.size(); ++i)
      data<uint16_t>(bits)[i] = __half_as_ushort(__float2half(data<float>(x)[i]));
  });
  m.def("to_bfloat16", [](const py::array& x, const py::array& bits) {
    for (py::ssize_t i = 0; i < x.size(); ++i)
      data<uint16_t>(bits)[i] = __bfloat16_as_ushort(__float2bfloat16(data<float>(x)[i]));
  });
  m.def("from_half", [](const py::array& bits, const py::array& x) {
    for (py::ssize_t i = 0; i < x.size(); ++i)
      data<float>(x)[i] = __half2float(__ushort_as_half(data<uint16_t>(bits)[i]));
  });
  m.def("from_bfloat16", [](const py::array& bits, const py::array& x) {
    for (py::ssize_t i = 0; i < x.size(); ++i)
      data<float>(x)[i] = __bfloat162float(__ushort_as_bfloat16(data<uint16_t>(bits)[i]));
  });
}
