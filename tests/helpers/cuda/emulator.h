// CUDA C++ on a CPU: what csrc/cuda/portable.h includes where there is no CUDA. A kernel's threads are fibers; its
// blocks run one after the other, in an order that the environment variable EXSSNET_EMULATOR_ORDER names (see
// emulator.cpp). What a GPU would leave undefined is an exception with the kernel's line, the block and the thread.
// Only what the kernels use is here. It cannot show speed, nor what depends on blocks that run at the same time.
#pragma once

#include <tuple>
#include <type_traits>

#include "emulated_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // with red zones around it
#else
#define __shared__ static thread_local  // all of it is this library's thread-local memory: found, and poisoned, as one
#endif

// Launches a kernel and gives the cudaError_t of the launch.
#define EXSSNET_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulator::launch(kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

// Declares `T* name`, the dynamic shared memory of the block.
#define EXSSNET_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulator::dynamic_shared)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kParameterBytes = 4096;

struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Place&) const = default;
};

extern void* dynamic_shared;
extern int64_t launches;  // since the program began

// Runs call(context) as every thread of the grid.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
         const void* context);
void allow_dynamic_shared(const void* kernel, size_t bytes);

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A&&... arguments) {
  static_assert((sizeof(P) + ... + 0) <= kParameterBytes, "kernel parameters of more than 4 KB");
  const std::tuple<std::remove_cv_t<P>...> parameters(static_cast<P>(arguments)...);
  const auto thread = [&] { std::apply(kernel, parameters); };
  run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](const void* context) { (*static_cast<decltype(&thread)>(context))(); }, &thread);
  return cudaSuccess;
}

struct Votes {
  int any, count, all;
};
Votes block_barrier(bool vote, Place where);

// Where the lanes of a mask meet: each gives a value and gets those of all 32.
enum class Meeting { sync, shuffle, vote };
const uint64_t* meet(unsigned mask, uint64_t value, Meeting meeting, Place where);
int lane();
[[noreturn]] void fail(Place where, const std::string& what);

// A copy to shared memory that a thread has begun. It lands when that awaits it.
struct Copy {
  uint4* to;
  uint4 vector;
};
void begin(const Copy& copy);
bool next_to_land(Copy& copy);  // of the current thread's, while there is one

// What the race detector has to know beyond loads and stores.
void on_atomic(const void* address, size_t bytes, Place where, const void* code);
void on_fence();

// The value of the lane `source` of the calling lane's segment of `width` lanes, or the own one if it is outside.
template <class T>
T shuffle(unsigned mask, T value, int source, int width, Place where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    fail(where, "a shuffle's width must be a power of two up to 32, got " + std::to_string(width));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* all = meet(mask, bits, Meeting::shuffle, where);
  const int first = lane() & ~(width - 1);
  if (source < first || source >= first + width) return value;
  if (!(mask >> source & 1))
    fail(where, "a shuffle reads lane " + std::to_string(source) + ", which is not in its mask");
  std::memcpy(static_cast<void*>(&value), all + source, sizeof value);
  return value;
}

// Changes *address to change(*address) and gives what was there. Not instrumented: the race detector is told instead.
template <class T, class F>
#ifdef __SANITIZE_THREAD__
__attribute__((no_sanitize("thread"), noinline))
#endif
T update(T* address, Place where, const F& change) {
  on_atomic(address, sizeof(T), where, __builtin_return_address(0));
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace emulator

// ---- asynchronous copies, as portable.h has them. They land when they are awaited, but may at once: the race detector
// sees both.

namespace exssnet::cuda {

inline void copy_async(uint4* to, const uint4* from, bool wanted) {
  const emulator::Copy copy{to, wanted ? *from : uint4{}};
#ifdef EXSSNET_TRACED
  *to = copy.vector;
#endif
  emulator::begin(copy);
}
inline void await_copies() {
  for (emulator::Copy copy; emulator::next_to_land(copy);) *copy.to = copy.vector;
}

}  // namespace exssnet::cuda

// ---- barriers and fences

inline void __syncthreads(emulator::Place where = emulator::Place::here()) { emulator::block_barrier(false, where); }
inline int __syncthreads_or(int vote, emulator::Place where = emulator::Place::here()) {
  return emulator::block_barrier(vote != 0, where).any;
}
inline int __syncthreads_and(int vote, emulator::Place where = emulator::Place::here()) {
  return emulator::block_barrier(vote != 0, where).all;
}
inline int __syncthreads_count(int vote, emulator::Place where = emulator::Place::here()) {
  return emulator::block_barrier(vote != 0, where).count;
}
inline void __syncwarp(unsigned mask = emulator::kAllLanes, emulator::Place where = emulator::Place::here()) {
  emulator::meet(mask, 0, emulator::Meeting::sync, where);
}
inline void __threadfence() { emulator::on_fence(); }

// ---- shuffles and votes

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Place where = emulator::Place::here()) {
  return emulator::shuffle(mask, value, (emulator::lane() & ~(width - 1)) | (source & (width - 1)), width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulator::Place where = emulator::Place::here()) {
  return emulator::shuffle(mask, value, emulator::lane() - static_cast<int>(delta), width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Place where = emulator::Place::here()) {
  return emulator::shuffle(mask, value, emulator::lane() + static_cast<int>(delta), width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, emulator::Place where = emulator::Place::here()) {
  return emulator::shuffle(mask, value, emulator::lane() ^ lanes, width, where);
}
inline unsigned __ballot_sync(unsigned mask, int vote, emulator::Place where = emulator::Place::here()) {
  const uint64_t* votes = emulator::meet(mask, vote != 0, emulator::Meeting::vote, where);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int vote, emulator::Place where = emulator::Place::here()) {
  return __ballot_sync(mask, vote, where) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulator::Place where = emulator::Place::here()) {
  return __ballot_sync(mask, vote, where) == mask;
}

// ---- atomics, on the types that CUDA has them for: the device's 64-bit integers are long long, not long

#define EXSSNET_ATOMIC(name, T, result)                                                          \
  inline T name(T* address, T value, emulator::Place where = emulator::Place::here()) {          \
    return emulator::update(address, where, [=](T old) { return static_cast<T>(result); });      \
  }
#define EXSSNET_ATOMICS(T)                                                                       \
  EXSSNET_ATOMIC(atomicAdd, T, old + value)                                                      \
  EXSSNET_ATOMIC(atomicMin, T, std::min(old, value))                                             \
  EXSSNET_ATOMIC(atomicMax, T, std::max(old, value))                                             \
  EXSSNET_ATOMIC(atomicAnd, T, old & value)                                                      \
  EXSSNET_ATOMIC(atomicOr, T, old | value)                                                       \
  EXSSNET_ATOMIC(atomicExch, T, ((void)old, value))                                              \
  inline T atomicCAS(T* address, T expected, T value, emulator::Place where = emulator::Place::here()) { \
    return emulator::update(address, where, [=](T old) { return old == expected ? value : old; });       \
  }
EXSSNET_ATOMICS(int)
EXSSNET_ATOMICS(unsigned)
EXSSNET_ATOMICS(unsigned long long)
#undef EXSSNET_ATOMICS
EXSSNET_ATOMIC(atomicMin, long long, std::min(old, value))
EXSSNET_ATOMIC(atomicMax, long long, std::max(old, value))
#undef EXSSNET_ATOMIC

// ---- memory and the runtime

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}
