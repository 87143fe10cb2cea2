// The emulator's scheduler: fibers, barriers, the meetings of a warp's lanes. x86-64 and Linux.
//
// EXSSNET_EMULATOR_ORDER names the order of blocks, and of warps and threads in a block:
//   ascending (the default), descending: each warp goes as far as it can before the next one starts;
//   round-robin: each thread goes on until it has to wait, then the next one, of all threads of the block;
//   a number: a seed of random orders, of blocks and anew for each block of warps and threads.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

#include "emulator_trace.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

void* dynamic_shared;
int64_t launches = 0;

namespace {

constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kSharedBytes = 48 << 10, kMostSharedBytes = 227 << 10;  // without and with leave, on sm_90 and sm_100
constexpr int kPoison = 0xff;                                            // NaN as a float, -1 as an integer

enum class State { ready, at_barrier, in_meeting, done };

struct Fiber {
  char* stack;
  void* stack_pointer;
  void* fake_stack;  // of AddressSanitizer
  State state;
  uint3 index;
  unsigned number, mask;  // of the thread in its block; of the meeting that it waits in
  Place where;            // it waits
  std::vector<Copy> copies;
};

// Lanes that come together; one for every lane that can be the lowest of a mask.
struct Lanes {
  unsigned mask, arrived = 0;
  Meeting meeting;
  Place where;
  uint64_t given[32], met[32];  // apart: a fast lane may give its next value before a slow one has read
};

struct Launch {
  void (*call)(const void*);
  const void* context;
  std::vector<Fiber*> fibers;        // by number
  std::vector<Lanes> lanes;          // 32 of each warp
  std::vector<unsigned> live_lanes;  // of each warp, a mask
  unsigned live, waiting;            // threads that have not returned; of these, at the barrier
  Place barrier;
  Votes votes, outcome;  // so far; of the last barrier that opened
};

Launch now;
Fiber* current = nullptr;  // null: the scheduler runs
void* scheduler;           // its stack pointer
std::string error;
std::unordered_map<const void*, size_t> allowed;  // dynamic shared memory of kernels

std::string describe(const std::string& what, Place where, const Fiber& fiber) {
  const auto point = [](auto p) {
    return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
  };
  const std::string file = where.file ? where.file : "kernel";
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line) + ": " + what + "; block " +
         point(blockIdx) + ", thread " + point(fiber.index);
}

// ---- fibers

// Saves the registers that a call must keep, leaves its stack pointer in *from, and goes on where `to` was left.
extern "C" void exssnet_emulator_switch(void** from, void* to);
asm(R"(
  .text
  .type exssnet_emulator_switch, @function
exssnet_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size exssnet_emulator_switch, . - exssnet_emulator_switch
)");

const void* scheduler_stack;
size_t scheduler_stack_bytes;
void* scheduler_fake_stack;
#ifdef __SANITIZE_ADDRESS__  // it is told of every switch of stacks
void before_switch(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
void in_fiber() { __sanitizer_finish_switch_fiber(current->fake_stack, &scheduler_stack, &scheduler_stack_bytes); }
void in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
#else
void before_switch(void**, const void*, size_t) {}
void in_fiber() {}
void in_scheduler() {}
#endif

void leave() {  // to the scheduler
  Fiber* const self = current;
  before_switch(self->state == State::done ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_bytes);
  exssnet_emulator_switch(&self->stack_pointer, scheduler);
  in_fiber();
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  trace::on_thread(fiber.number, {fiber.stack, kStack});
  before_switch(&scheduler_fake_stack, fiber.stack, kStack);
  exssnet_emulator_switch(&scheduler, fiber.stack_pointer);
  in_scheduler();
  trace::on_scheduler();
  current = nullptr;
}

void thread_main() {
  in_fiber();
  now.call(now.context);
  if (!current->copies.empty() && error.empty())
    error = describe("ends with copies that it did not await", {}, *current);
  current->state = State::done;
  now.live_lanes[current->number / 32] &= ~(1u << current->number % 32);
  --now.live;
  leave();
  std::abort();  // nobody resumes it
}

Fiber* new_fiber() {
  void* const memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("the emulator has no memory for the stack of another thread");
  mprotect(memory, kPage, PROT_NONE);  // what overruns the stack stops here
  Fiber* const fiber = new Fiber{};
  fiber->stack = static_cast<char*>(memory) + kPage;
  return fiber;
}

void start(Fiber& fiber, unsigned number) {
  fiber.number = number;
  fiber.index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y};
  fiber.state = State::ready;
  fiber.fake_stack = nullptr;
  fiber.copies.clear();
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack, kStack);  // after a thread that an error left in the middle
#endif
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;  // where thread_main would return to
  *--top = reinterpret_cast<void*>(thread_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

// ---- memory

struct Range {
  char* begin;
  size_t bytes;
};

#ifdef __SANITIZE_ADDRESS__
Range static_shared() { return {nullptr, 0}; }
#else
thread_local char in_this_library;  // beside the kernels' shared memory, nothing else here is thread-local

Range static_shared() {
  static const Range found = [] {
    Range range{&in_this_library, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* result) {
          Range& range = *static_cast<Range*>(result);
          for (int i = 0; i < library->dlpi_phnum; ++i) {
            char* const begin = static_cast<char*>(library->dlpi_tls_data);
            const size_t bytes = library->dlpi_phdr[i].p_memsz;
            if (library->dlpi_phdr[i].p_type != PT_TLS || !begin || &in_this_library < begin) continue;
            if (&in_this_library < begin + bytes) range = {begin, bytes};
          }
          return 0;
        },
        &range);
    return range;
  }();
  return found;
}
#endif

// ---- orders

class Order {
 public:
  Order() : name_(std::getenv("EXSSNET_EMULATOR_ORDER") ? std::getenv("EXSSNET_EMULATOR_ORDER") : "ascending") {
    if (name_ == "ascending" || name_ == "descending" || name_ == "round-robin") return;
    if (name_.empty() || name_.find_first_not_of("0123456789") != std::string::npos)
      throw std::runtime_error(
          "EXSSNET_EMULATOR_ORDER must be ascending, descending, round-robin or a number, got " + name_);
    random_.seed(std::stoul(name_));
    shuffled_ = true;
  }

  bool together() const { return name_ == "round-robin"; }

  template <class I>
  std::vector<I> of(I first, I count) {
    std::vector<I> order(count);
    std::iota(order.begin(), order.end(), first);
    if (name_ == "descending") std::reverse(order.begin(), order.end());
    if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

 private:
  std::string name_;
  bool shuffled_ = false;
  std::mt19937_64 random_;
};

// ---- the scheduler

// Runs each of these threads until none is ready, or just once. Whether any ran.
bool run_threads(const std::vector<unsigned>& numbers, bool once) {
  bool ran = false, again = true;
  while (again && error.empty()) {
    again = false;
    for (const unsigned number : numbers) {
      Fiber& fiber = *now.fibers[number];
      if (fiber.state != State::ready || !error.empty()) continue;
      resume(fiber);
      again = true;
    }
    ran |= again;
    if (once) break;
  }
  return ran;
}

void open_barrier() {
  now.outcome = now.votes;
  now.waiting = 0;
  trace::on_block_barrier();
  for (Fiber* fiber : now.fibers)
    if (fiber->state == State::at_barrier) fiber->state = State::ready;
}

void report_deadlock() {
  const Fiber* stuck = nullptr;
  for (const Fiber* fiber : now.fibers)
    if (fiber->state != State::done && (!stuck || fiber->state == State::in_meeting)) stuck = fiber;
  const bool lanes = stuck->state == State::in_meeting;
  error = describe(std::string("waits for ") + (lanes ? "lanes of its mask" : "threads of its block") +
                       " that never come here",
                   stuck->where, *stuck);
}

void run_block(Order& order, unsigned threads) {
  const unsigned warps = (threads + 31) / 32;
  now.lanes.assign(warps * 32, {});
  now.live_lanes.assign(warps, 0);
  for (unsigned number = 0; number < threads; ++number) now.live_lanes[number / 32] |= 1u << number % 32;
  now.live = threads;
  now.waiting = 0;
  for (unsigned number = 0; number < threads; ++number) start(*now.fibers[number], number);
  std::vector<std::vector<unsigned>> groups;
  if (order.together()) {
    groups.push_back(order.of(0u, threads));
  } else {
    for (const unsigned warp : order.of(0u, warps))
      groups.push_back(order.of(warp * 32, std::min(32u, threads - warp * 32)));
  }
  while (now.live > 0 && error.empty()) {
    bool ran = false;
    for (const auto& group : groups) ran |= run_threads(group, order.together());
    if (!error.empty() || now.live == 0) break;
    if (now.waiting == now.live) open_barrier();
    else if (!ran) report_deadlock();
  }
}

void check_limits(const void* kernel, size_t shared_bytes) {
  const auto refuse = [](const std::string& what) { throw std::runtime_error("launch: " + what); };
  const auto sizes = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  const uint64_t threads = uint64_t{blockDim.x} * blockDim.y * blockDim.z;
  if (threads == 0 || blockDim.x > 1024 || blockDim.y > 1024 || blockDim.z > 64 || threads > 1024)
    refuse("a block must have 1 to 1024 threads, at most 64 of them in z, got " + sizes(blockDim));
  if (gridDim.x == 0 || gridDim.y == 0 || gridDim.z == 0 || gridDim.x > 0x7fffffff || gridDim.y > 65535 ||
      gridDim.z > 65535)
    refuse("a grid must have 1 to 2147483647 x 65535 x 65535 blocks, got " + sizes(gridDim));
  const size_t most = std::max(kSharedBytes, allowed[kernel]);
  if (shared_bytes > most)
    refuse("this kernel may have " + std::to_string(most) + " bytes of dynamic shared memory, got " +
           std::to_string(shared_bytes) + (most == kSharedBytes ? " without cudaFuncSetAttribute" : ""));
}

}  // namespace

void begin(const Copy& copy) { current->copies.push_back(copy); }

bool next_to_land(Copy& copy) {
  if (current->copies.empty()) return false;
  copy = current->copies.back();
  current->copies.pop_back();
  return true;
}

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kMostSharedBytes)
    throw std::runtime_error("cudaFuncSetAttribute: a block has at most " + std::to_string(kMostSharedBytes) +
                             " bytes of shared memory, got " + std::to_string(bytes));
  allowed[kernel] = bytes;
}

void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*),
         const void* context) {
  gridDim = grid;
  blockDim = block;
  check_limits(kernel, shared_bytes);
  ++launches;
  Order order;
  const unsigned threads = block.x * block.y * block.z;
  static std::vector<std::unique_ptr<Fiber>> fibers;
  while (fibers.size() < threads) fibers.emplace_back(new_fiber());
  now.call = call;
  now.context = context;
  now.fibers.clear();
  for (unsigned number = 0; number < threads; ++number) now.fibers.push_back(fibers[number].get());
  void* memory = nullptr;
  if (shared_bytes > 0 && posix_memalign(&memory, 16, shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
  dynamic_shared = memory;
  error.clear();
  const Range shared = static_shared();
  trace::on_launch({shared.begin, shared.bytes}, {static_cast<char*>(memory), shared_bytes});
  for (const uint64_t number : order.of(uint64_t{0}, uint64_t{grid.x} * grid.y * grid.z)) {
    blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                static_cast<unsigned>(number / grid.x / grid.y)};
    if (shared.bytes > 0) std::memset(shared.begin, kPoison, shared.bytes);
    if (shared_bytes > 0) std::memset(memory, kPoison, shared_bytes);
    trace::on_block(number, threads);
    run_block(order, threads);
    if (!error.empty()) throw std::runtime_error(error);
  }
}

void fail(Place where, const std::string& what) {
  error = describe(what, where, *current);
  while (true) leave();  // for good
}

int lane() { return static_cast<int>(current->number % 32); }

Votes block_barrier(bool vote, Place where) {
  if (now.waiting == 0) {
    now.barrier = where;
    now.votes = {0, 0, 1};
  } else if (!(now.barrier == where)) {
    fail(where, "other threads of the block wait at the barrier of line " + std::to_string(now.barrier.line));
  }
  now.votes = {now.votes.any | vote, now.votes.count + vote, now.votes.all & vote};
  ++now.waiting;
  current->state = State::at_barrier;
  current->where = where;
  leave();
  return now.outcome;
}

const uint64_t* meet(unsigned mask, uint64_t value, Meeting meeting, Place where) {
  const unsigned lane = current->number % 32, first = current->number - lane;
  if (!(mask >> lane & 1)) fail(where, "the calling lane is not in its mask");
  if (const unsigned gone = mask & ~now.live_lanes[first / 32])
    fail(where, "lane " + std::to_string(std::countr_zero(gone)) + " of the mask has returned or was never there");
  Lanes& lanes = now.lanes[first + static_cast<unsigned>(std::countr_zero(mask))];
  if (lanes.arrived == 0) {
    lanes.mask = mask;
    lanes.meeting = meeting;
    lanes.where = where;
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      const Fiber& other = *now.fibers[first + static_cast<unsigned>(std::countr_zero(rest))];
      if (other.state == State::in_meeting && other.mask != mask)
        fail(where, "lane " + std::to_string(other.number % 32) + " of the mask waits with another mask in line " +
                        std::to_string(other.where.line));
    }
  } else if (lanes.mask != mask) {
    fail(where, "other lanes wait with another mask in line " + std::to_string(lanes.where.line));
  } else if (lanes.meeting != meeting || (meeting != Meeting::sync && !(lanes.where == where))) {
    fail(where, "other lanes of the mask wait for another exchange in line " + std::to_string(lanes.where.line));
  }
  lanes.given[lane] = value;
  lanes.arrived |= 1u << lane;
  if (lanes.arrived != mask) {
    current->state = State::in_meeting;
    current->mask = mask;
    current->where = where;
    leave();
    return lanes.met;
  }
  std::memcpy(lanes.met, lanes.given, sizeof lanes.met);
  lanes.arrived = 0;
  if (meeting == Meeting::sync) trace::on_warp_barrier(first, mask);
  for (unsigned other = 0; other < 32; ++other)
    if ((mask >> other & 1) && other != lane) now.fibers[first + other]->state = State::ready;
  return lanes.met;
}

void on_atomic(const void* address, size_t bytes, Place where, const void* code) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail(where, "an atomic on an address that is not aligned");
  trace::on_atomic(address, bytes, code);
}

void on_fence() { trace::on_fence(); }

}  // namespace emulator
