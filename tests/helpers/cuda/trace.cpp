// The race detector: what -fsanitize=thread calls at every load and store of a kernel (libtsan itself is not linked).
// Two accesses to one place race, if one of them is a store and not both are atomic, unless they are ordered:
//   within a block by a block barrier between them, within a warp by a __syncwarp of both lanes (a vector clock, as in
//   Flanagan and Freund, "FastTrack", PLDI 2009; shuffles and votes order nothing);
//   between blocks by nothing, except where the earlier block has called __threadfence after its access and both
//   blocks have, after a fence, met in an atomic on one address: the counter by which a last block knows itself.
// A race, or a load of shared memory that its block has not written, ends the launch with an error.
#include "emulator_trace.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulator::trace {

namespace {

using Address = uintptr_t;

struct Access {
  const void* code = nullptr;  // where it was called from; null: no such access yet
  uint32_t block, epoch, clock, fences;
  uint16_t thread;
  bool atomic;
};

// The accesses to some bytes. Kept: the first one since a barrier, or of another block, and the last one.
struct Cell {
  Access stores[2], loads[2];
  uint32_t lanes = 0;  // of the last load's warp: those that loaded at the same time of their clocks
};

// 64 bytes of memory, by words, or by bytes once an access is smaller than a word.
struct Line {
  size_t grain = 4;
  std::vector<Cell> cells = std::vector<Cell>(16);

  void split() {
    std::vector<Cell> bytes;
    for (const Cell& cell : cells) bytes.insert(bytes.end(), grain, cell);
    cells.swap(bytes);
    grain = 1;
  }
};
constexpr Address kLine = 64;
using Lines = std::unordered_map<Address, Line>;

Memory static_memory, dynamic_memory, stack;
Lines global_lines, shared_lines;
bool in_kernel = false;
uint32_t block, epoch, thread;
std::vector<std::array<uint32_t, 32>> clocks;  // by thread: how far it knows each lane of its warp to be
std::map<uint32_t, std::vector<uint32_t>> fences;  // by block and thread: how many so far; of blocks with fences
std::map<uint32_t, std::set<Address>> met;         // by block: addresses of its atomics after a fence

bool inside(const Memory& memory, const char* address) {
  return memory.begin <= address && address < memory.begin + memory.bytes;
}

uint32_t fences_of(uint32_t b, uint32_t t) {
  const auto found = fences.find(b);
  return found == fences.end() ? 0 : found->second[t];
}

bool handed_over(const Access& earlier) {
  if (!earlier.atomic && fences_of(earlier.block, earlier.thread) <= earlier.fences) return false;
  const auto theirs = met.find(earlier.block), ours = met.find(block);
  if (theirs == met.end() || ours == met.end()) return false;
  return std::any_of(ours->second.begin(), ours->second.end(), [&](Address a) { return theirs->second.count(a); });
}

bool ordered(const Access& earlier) {
  if (earlier.block != block) return handed_over(earlier);
  if (earlier.epoch != epoch || earlier.thread == thread) return true;
  return earlier.thread / 32 == thread / 32 && clocks[thread][earlier.thread % 32] >= earlier.clock;
}

// The kernel's line that a call returns to: of the functions inlined there, the innermost that is not the emulator's.
Place place_of(const void* code) {
  static std::string file;
  Dl_info library;
  if (!dladdr(code, &library)) return {"kernel", 0};
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase) - 1;
  char command[4096], text[4096];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' %#lx", library.dli_fname, static_cast<long>(offset));
  FILE* const output = popen(command, "r");
  if (!output) return {"kernel", 0};
  int line = 0;
  while (std::fgets(text, sizeof text, output)) {
    const std::string frame = text;
    if (line != 0 || frame.find("/emulat") != std::string::npos || frame.find(':') == std::string::npos) continue;
    file = frame.substr(0, frame.rfind(':'));
    line = std::atoi(frame.c_str() + frame.rfind(':') + 1);
  }
  pclose(output);
  return {file.c_str(), line};
}

void check(const Access& earlier, const Access& now, const char* earlier_does, const char* does, bool shared) {
  if (!earlier.code || (earlier.atomic && now.atomic) || ordered(earlier)) return;
  const int line = place_of(earlier.code).line;
  fail(place_of(now.code), std::string("race: ") + does + (shared ? " shared" : " global") + " memory that thread " +
                               std::to_string(earlier.thread) + " of block " + std::to_string(earlier.block) + " " +
                               earlier_does + " in line " + std::to_string(line));
}

void keep(Access (&accesses)[2], const Access& now) {
  const Access& first = accesses[0];
  if (!first.code || (first.block == block && first.epoch != epoch)) accesses[0] = now;
  accesses[1] = now;
}

void load(Cell& cell, const Access& now, bool shared) {
  if (shared && !cell.stores[1].code)
    fail(place_of(now.code), "a load of shared memory that its block has not written");
  for (const Access& store : cell.stores) check(store, now, "stores to", "loads", shared);
  const Access& last = cell.loads[1];
  const bool together = last.code && last.block == block && last.epoch == epoch && last.thread / 32 == thread / 32 &&
                        last.clock == now.clock;
  cell.lanes = (together ? cell.lanes : 0) | 1u << thread % 32;
  keep(cell.loads, now);
}

void store(Cell& cell, const Access& now, bool shared) {
  for (const Access& earlier : cell.stores) check(earlier, now, "stores to", "stores to", shared);
  for (const Access& earlier : cell.loads) check(earlier, now, "loads", "stores to", shared);
  for (uint32_t lanes = cell.lanes; lanes != 0; lanes &= lanes - 1) {
    Access earlier = cell.loads[1];
    earlier.thread = static_cast<uint16_t>(earlier.thread / 32 * 32 + std::countr_zero(lanes));
    check(earlier, now, "loads", "stores to", shared);
  }
  keep(cell.stores, now);
}

enum class Kind { load, store, atomic };

void access(const void* memory, size_t bytes, Kind kind, const void* code) {
  const char* const from = static_cast<const char*>(memory);
  if (!in_kernel || inside(stack, from)) return;
  const bool shared = inside(static_memory, from) || inside(dynamic_memory, from);
  const Access now{.code = code, .block = block, .epoch = epoch, .clock = clocks[thread][thread % 32],
                   .fences = fences_of(block, thread), .thread = static_cast<uint16_t>(thread),
                   .atomic = kind == Kind::atomic};
  const Address begin = reinterpret_cast<Address>(from), end = begin + bytes;
  for (Address at = begin; at < end;) {
    Line& line = (shared ? shared_lines : global_lines)[at / kLine];
    if (line.grain > 1 && (begin % line.grain != 0 || end % line.grain != 0)) line.split();
    Cell& cell = line.cells[at % kLine / line.grain];
    if (kind == Kind::store) store(cell, now, shared);
    else if (kind == Kind::load) load(cell, now, shared);
    else if (shared && !cell.stores[1].code)
      fail(place_of(code), "an atomic on shared memory that its block has not written");
    else store(cell, now, shared);
    at += line.grain;
  }
}

}  // namespace

void on_launch(Memory static_shared, Memory dynamic_shared) {
  static_memory = static_shared;
  dynamic_memory = dynamic_shared;
  global_lines.clear();
  fences.clear();
  met.clear();
}

void on_block(uint64_t number, unsigned threads) {
  block = static_cast<uint32_t>(number);
  epoch = 0;
  shared_lines.clear();
  clocks.assign(threads, {});
  for (unsigned t = 0; t < threads; ++t) clocks[t][t % 32] = 1;
}

void on_thread(unsigned number, Memory its_stack) {
  thread = number;
  stack = its_stack;
  in_kernel = true;
}

void on_scheduler() { in_kernel = false; }

void on_block_barrier() { ++epoch; }

void on_warp_barrier(unsigned first_thread, unsigned mask) {
  std::array<uint32_t, 32> joined{};
  const unsigned last = std::min<unsigned>(first_thread + 32, clocks.size());
  for (unsigned t = first_thread; t < last; ++t)
    if (mask >> t % 32 & 1)
      for (int lane = 0; lane < 32; ++lane) joined[lane] = std::max(joined[lane], clocks[t][lane]);
  for (unsigned t = first_thread; t < last; ++t)
    if (mask >> t % 32 & 1) {
      clocks[t] = joined;
      ++clocks[t][t % 32];
    }
}

void on_atomic(const void* address, size_t bytes, const void* code) {
  access(address, bytes, Kind::atomic, code);
  if (fences.count(block)) met[block].insert(reinterpret_cast<Address>(address));
}

void on_fence() {
  std::vector<uint32_t>& counts = fences[block];
  counts.resize(blockDim.x * blockDim.y * blockDim.z);
  ++counts[thread];
}

// ---- the instrumentation's calls

#define EXSSNET_ON_ACCESS(name, bytes, kind) \
  extern "C" void __tsan_##name(void* memory) { access(memory, bytes, Kind::kind, __builtin_return_address(0)); }
#define EXSSNET_ON_ACCESSES(bytes)                  \
  EXSSNET_ON_ACCESS(read##bytes, bytes, load)       \
  EXSSNET_ON_ACCESS(write##bytes, bytes, store)     \
  EXSSNET_ON_ACCESS(unaligned_read##bytes, bytes, load) \
  EXSSNET_ON_ACCESS(unaligned_write##bytes, bytes, store)
EXSSNET_ON_ACCESSES(1)
EXSSNET_ON_ACCESSES(2)
EXSSNET_ON_ACCESSES(4)
EXSSNET_ON_ACCESSES(8)
EXSSNET_ON_ACCESSES(16)
extern "C" void __tsan_read_range(void* memory, size_t bytes) {
  access(memory, bytes, Kind::load, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* memory, size_t bytes) {
  access(memory, bytes, Kind::store, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

}  // namespace emulator::trace
