// Heap buffers of exactly their sizes, random whole numbers to fill them, and comparisons that end the program.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "core/floats.h"

namespace {

using namespace exssnet;

std::mt19937 generator(0);

int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "wrong result: %s\n", what.c_str());
  std::exit(1);
}

template <class T>
double number(T x) {
  return static_cast<double>(x);
}
double number(BFloat16 x) { return value(x); }

template <class T>
T stored(double x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    BFloat16 to;
    store(x, to);
    return to;
  } else {
    return static_cast<T>(x);
  }
}

// Memory that ends where its elements end.
template <class T>
struct Buffer {
  int64_t size;
  std::unique_ptr<T, decltype(&std::free)> memory;

  explicit Buffer(int64_t n) : size(n), memory(static_cast<T*>(std::malloc(n * sizeof(T))), &std::free) {}
  template <class Make>
  Buffer(int64_t n, const Make& make) : Buffer(n) {
    for (int64_t i = 0; i < n; ++i) memory.get()[i] = stored<T>(make(i));
  }
  T* data() const { return memory.get(); }
  T& operator[](int64_t i) const { return memory.get()[i]; }
};

template <class T>
Buffer<T> whole(int64_t n) {
  return Buffer<T>(n, [](int64_t) { return below(9) - 4; });
}

template <class T, class U>
void expect_equal(const Buffer<T>& got, const std::vector<U>& expected, const std::string& what) {
  for (int64_t i = 0; i < got.size; ++i)
    if (number(got[i]) != number(stored<T>(expected[i]))) fail(what + ", entry " + std::to_string(i));
}

}  // namespace
