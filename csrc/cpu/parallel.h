// The only access to the thread pool. Kernels give a range and a grain size, and never use threads directly.
#pragma once

#include <cstdint>

#ifndef EXSSNET_STD_THREADS

namespace exssnet {
using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
// torch's own pool (parallel.cpp). A second pool in the process would compete with it for the cores.
void run_parallel(int64_t count, int64_t grain, RangeFn fn, void* context);
int64_t max_threads();
}  // namespace exssnet

#else  // builds with ThreadSanitizer, which does not understand torch's pool, use plain threads

#include <algorithm>
#include <thread>
#include <vector>

namespace exssnet {
using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
inline int64_t max_threads() { return std::max(2u, std::thread::hardware_concurrency()); }
inline void run_parallel(int64_t count, int64_t grain, RangeFn fn, void* context) {
  const int64_t step = std::max(grain, (count + max_threads() - 1) / max_threads());
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += step)
    threads.emplace_back(fn, begin, std::min(count, begin + step), context);
  for (auto& thread : threads) thread.join();
}
}  // namespace exssnet

#endif

namespace exssnet {
// Calls body(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` where possible.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  if (count <= 0) return;
  run_parallel(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}
}  // namespace exssnet
