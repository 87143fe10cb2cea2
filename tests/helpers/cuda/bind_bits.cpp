// csrc/cuda/bits over NumPy arrays.
#include "cuda/bits.h"

#include "arrays.h"

using namespace exssnet;

PYBIND11_MODULE(bits_emulated, m) {
  m.def("pack_mask", [](const py::array& mask, const py::array& packed) {
    check(cuda::pack_mask(data<bool>(mask), mask.size(), data<uint8_t>(packed), nullptr));
  });
  m.def("unpack_mask", [](const py::array& packed, const py::array& mask) {
    check(cuda::unpack_mask(data<uint8_t>(packed), mask.size(), data<bool>(mask), nullptr));
  });
  m.def("and_not", [](const py::array& mask, const py::array& used, const py::array& free) {
    check(cuda::and_not(data<uint8_t>(mask), data<uint8_t>(used), mask.size(), data<uint8_t>(free), nullptr));
  });
}
