// The machine that runs a grid: a fiber per CUDA thread, a few blocks in flight, an adversarial choice of who goes on.
//
// A thread runs until it waits for others; nothing preempts it. Whoever completes a barrier or a collective makes the others
// ready; the order (first come, last come, or random by seed) decides which ready thread goes on, and in which order the blocks
// start. One grid at a time: the machine is a global of the library that holds the kernel.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "context.h"
#include "mapping.h"
#include "sanitizers.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emu {

using Site = std::source_location;

// What a thread waits in. aligned: every lane of the mask must take part, from the same place. orders: memory accesses before
// it happen before those after it.
struct Kind {
  const char* name;
  bool aligned, orders;
};

struct Block;

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int group;
};

struct Fiber {
  Context context;
  Block* block = nullptr;
  int thread = 0;
  bool done = false;
  const Kind* waits = nullptr;  // null while it runs or is ready
  Site at;
  const void* token = nullptr;  // what to acquire when the wait is over
  int result = 0;               // of a barrier that also reduces

  std::vector<Copy> copies;  // asynchronous and not complete, oldest first
  int group = 0;             // of the next copy

  bool fenced = false;             // has passed a __threadfence
  char fence = 0;                  // token of all that came before the last one
  std::vector<const void*> flags;  // atomics since the last one

  Mapping stack;
  void* tsan = nullptr;
  void* asan = nullptr;

  int lane() const { return thread % 32; }
};

// A collective that some lanes of a warp have reached.
struct Gathering {
  unsigned mask, have;
  const Kind* kind;
  Site at;
  void (*work)(void* const* arguments, unsigned lanes);
  const void* token;
  void* arguments[32];
  Fiber* lanes[32];
};

struct Warp {
  unsigned alive = 0;
  std::vector<Gathering> open;
  unsigned sequence = 0;
  char tokens[64];
};

struct Block {
  dim3 index;
  int alive = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Mapping shared;
  char* memory = nullptr;  // the dynamic shared memory

  std::vector<Fiber*> at_barrier;
  int votes = 0;
  unsigned phase = 0;
  char tokens[2];
};

enum class Order : int { fifo, lifo, random };

// Filled by runtime.py.
struct Launch {
  int grid[3], block, shared_bytes, order, inflight, extents;
  uint64_t seed;
  const uint64_t* extent;  // pairs of first byte and byte past the last that async copies may read
};

struct Counters {
  uint64_t switches = 0, collectives = 0, barriers = 0, copies = 0, matrices = 0;
};

struct Conflict {
  Site at;
  uint64_t phases, extra;
};

struct Machine {
  Launch launch;
  dim3 grid, block_size;
  void (*invoke)(const void* params) = nullptr;
  const void* params = nullptr;

  Fiber* current = nullptr;  // null in the scheduler
  std::vector<Fiber*> ready;
  size_t head = 0;
  std::vector<std::unique_ptr<Block>> flying, idle;
  Context scheduler;
  void* scheduler_tsan = nullptr;
  void* scheduler_asan = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  char start = 0, end = 0;  // tokens of the grid's beginning and end

  uint64_t state = 1;
  uint64_t idle_polls = 0;  // since a thread last made progress
  bool failed = false;
  std::string error;
  const void* fault = nullptr;  // instruction that trapped
  Counters counters;
  std::vector<Conflict> conflicts;

  Order order() const { return static_cast<Order>(launch.order); }
  uint64_t random() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull >> 16;
  }
};

inline Machine machine;

constexpr size_t kStackBytes = EMU_ASAN || EMU_TSAN ? 256 << 10 : 128 << 10;

EMU_UNSEEN Fiber& self() { return *machine.current; }

inline std::string format(const char* text, va_list arguments) {
  char buffer[512];
  vsnprintf(buffer, sizeof buffer, text, arguments);
  return buffer;
}

inline std::string place(Site at) {
  const char* name = at.file_name();
  for (const char* c = name; *c; c++)
    if (*c == '/') name = c + 1;
  return std::string(name) + ":" + std::to_string(at.line());
}

inline std::string name(const Block& b) {
  auto n = [](unsigned x) { return std::to_string(x); };
  return "block (" + n(b.index.x) + ", " + n(b.index.y) + ", " + n(b.index.z) + ")";
}

// ---- switching

// Leaves `from` (a fiber, or null: the scheduler) for `to`; returns when somebody comes back.
#if EMU_TSAN
__attribute__((noinline, no_sanitize("thread")))
#else
__attribute__((noinline))
#endif
inline void change(Fiber* from, Fiber* to) {
  machine.counters.switches++;
  machine.current = to;
#if EMU_TSAN
  __tsan_switch_to_fiber(to ? to->tsan : machine.scheduler_tsan, 1);
#endif
#if EMU_ASAN
  void** save = from ? &from->asan : &machine.scheduler_asan;
  if (to)
    __sanitizer_start_switch_fiber(save, to->stack.begin(), to->stack.bytes());
  else
    __sanitizer_start_switch_fiber(save, machine.scheduler_stack, machine.scheduler_stack_bytes);
#endif
  Context::swap(from ? from->context : machine.scheduler, to ? to->context : machine.scheduler);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(from ? from->asan : machine.scheduler_asan, nullptr, nullptr);
#endif
}

inline Fiber* pick() {
  auto& ready = machine.ready;
  if (machine.head == ready.size()) return nullptr;
  Fiber* f;
  if (machine.order() == Order::fifo) {
    f = ready[machine.head++];
  } else {
    if (machine.order() == Order::random) std::swap(ready[machine.random() % ready.size()], ready.back());
    f = ready.back();
    ready.pop_back();
  }
  if (machine.head == ready.size() || machine.head > 4096) {
    ready.erase(ready.begin(), ready.begin() + static_cast<std::ptrdiff_t>(machine.head));
    machine.head = 0;
  }
  return f;
}

// Gives the processor to another thread, until somebody has made this one ready.
inline void park() {
  Fiber* me = machine.current;
  Fiber* next = pick();
  if (next != me) change(me, next);
}

// Lets others go first, if there are any.
inline void step_back() {
  machine.ready.push_back(machine.current);
  park();
}

// In a random schedule a thread sometimes does.
inline void waver() {
  if (machine.order() == Order::random && machine.random() % 4 == 0) step_back();
}

// Ends the grid with an error; whatever else its threads would have done is dropped.
[[noreturn]] inline void fail(Site at, const char* text, ...) {
  Quiet quiet;
  va_list arguments;
  va_start(arguments, text);
  std::string message = format(text, arguments);
  va_end(arguments);
  Fiber* me = machine.current;
  machine.error = place(at) + ": " + message + ", " + name(*me->block) + " thread " + std::to_string(me->thread);
  machine.failed = true;
  change(me, nullptr);
  __builtin_unreachable();
}

}  // namespace emu
