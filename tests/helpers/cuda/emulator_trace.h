// What the emulator's scheduler tells the race detector (trace.cpp), which is there in builds with -fsanitize=thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator::trace {

struct Memory {
  const char* begin;
  size_t bytes;
};

#ifdef EXSSNET_TRACED
void on_launch(Memory static_shared, Memory dynamic_shared);
void on_block(uint64_t block, unsigned threads);
void on_thread(unsigned thread, Memory stack);  // this one runs now
void on_scheduler();                            // none runs
void on_block_barrier();
void on_warp_barrier(unsigned first_thread, unsigned mask);
void on_atomic(const void* address, size_t bytes, const void* code);
void on_fence();
#else
inline void on_launch(Memory, Memory) {}
inline void on_block(uint64_t, unsigned) {}
inline void on_thread(unsigned, Memory) {}
inline void on_scheduler() {}
inline void on_block_barrier() {}
inline void on_warp_barrier(unsigned, unsigned) {}
inline void on_atomic(const void*, size_t, const void*) {}
inline void on_fence() {}
#endif

}  // namespace emulator::trace
