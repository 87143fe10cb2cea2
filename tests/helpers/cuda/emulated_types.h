// CUDA's types, and functions of one thread alone, as far as the kernels use them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/floats.h"

// ---- what the runtime's interface mentions

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;

  dim3() = default;
  template <class X, class Y = int, class Z = int>
  dim3(X x, Y y = 1, Z z = 1) : x(fitting(x)), y(fitting(y)), z(fitting(z)) {}

 private:
  template <class I>
  static unsigned fitting(I size) {  // CUDA would keep the low 32 bits
    if (!std::in_range<unsigned>(size))
      throw std::runtime_error("dim3: " + std::to_string(size) + " is no 32-bit size");
    return static_cast<unsigned>(size);
  }
};

// ---- vectors, aligned as CUDA aligns them: a load through a pointer that is not is undefined here too

#define EXSSNET_VECTORS(T, name, align2, align4)                                                   \
  struct alignas(align2) name##2 {                                                                 \
    T x, y;                                                                                        \
  };                                                                                               \
  struct alignas(align4) name##4 {                                                                 \
    T x, y, z, w;                                                                                  \
  };                                                                                               \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                       \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EXSSNET_VECTORS(signed char, char, 2, 4)
EXSSNET_VECTORS(unsigned char, uchar, 2, 4)
EXSSNET_VECTORS(short, short, 4, 8)
EXSSNET_VECTORS(unsigned short, ushort, 4, 8)
EXSSNET_VECTORS(int, int, 8, 16)
EXSSNET_VECTORS(unsigned, uint, 8, 16)
EXSSNET_VECTORS(float, float, 8, 16)
#undef EXSSNET_VECTORS
#define EXSSNET_PAIR(T, name)                                                                      \
  struct alignas(16) name##2 {                                                                     \
    T x, y;                                                                                        \
  };                                                                                               \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }
EXSSNET_PAIR(long long, longlong)
EXSSNET_PAIR(unsigned long long, ulonglong)
EXSSNET_PAIR(double, double)
#undef EXSSNET_PAIR

// ---- half types: a float rounds to nearest, ties to even

struct __half : exssnet::Float16 {
  __half() = default;
  __half(float x) { exssnet::store(x, *this); }
  operator float() const { return exssnet::value(*this); }
};
struct __nv_bfloat16 : exssnet::BFloat16 {
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) { exssnet::store(x, *this); }
  operator float() const { return exssnet::value(*this); }
};
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }

// ---- bits

inline unsigned short __half_as_ushort(__half x) { return std::bit_cast<unsigned short>(x); }
inline __half __ushort_as_half(unsigned short x) { return std::bit_cast<__half>(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return std::bit_cast<unsigned short>(x); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return std::bit_cast<__nv_bfloat16>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }

// ---- arithmetic; fmaf, sqrtf, fmaxf and so on are those of <cmath>

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }  // these are never contracted into fused operations
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
