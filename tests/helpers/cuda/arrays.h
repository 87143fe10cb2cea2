// NumPy arrays and errors where the bindings of the tests meet the launchers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/portable.h"

namespace py = pybind11;

// The memory of an array as T: a contiguous one with elements of that size, never a copy. Half types come as uint16.
template <class T>
T* data(const py::array& array) {
  if (array.itemsize() != sizeof(T) || !(array.flags() & py::array::c_style))
    throw std::invalid_argument("expected a contiguous array of " + std::to_string(sizeof(T)) + "-byte elements");
  return static_cast<T*>(const_cast<void*>(array.data()));
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("CUDA error " + std::to_string(error));
}
