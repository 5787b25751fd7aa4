// The state of the machine that runs a grid: a fiber per CUDA thread, a few blocks in flight, an adversarial choice of who goes on.
//
// A thread runs until it waits for others; nothing preempts it. Whoever completes a barrier or a collective makes the others
// ready; the order (first come, last come, or random by seed) decides which ready thread goes on, and in which order the blocks
// start. One grid at a time: the machine is a global of the library that holds the kernel.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "context.h"
#include "mapping.h"
#include "threads.h"

namespace emu {

struct Block;
struct Cluster;

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int bytes, group;
};

struct Fiber {
  Context context;
  Block* block = nullptr;
  int thread = 0;
  bool done = false;
  const Kind* waits = nullptr;  // null while it runs or is ready
  Site at;
  const Kind* kind = nullptr;  // of the last barrier
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
  Cluster* cluster = nullptr;
  int rank = 0;  // in it
  int alive = 0;
  bool started = false;  // a thread of it has run
  bool waited = false;   // a thread of it has waited for the launch before
  bool open = true;      // its shared memory is within reach
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Mapping shared;
  char* memory = nullptr;  // the dynamic shared memory

  std::vector<Fiber*> at_barrier;
  int votes = 0;
  unsigned phase = 0;
  char tokens[2];
  Fiber* at_cluster_barrier = nullptr;  // one that waits there
  char start = 0, end = 0;              // tokens of its first thread's beginning and of its threads' ends
};

// Blocks that start together. Their shared memory stays where it is until all have ended, out of reach before the first thread of
// a block has run and after its last.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber*> at_barrier;
  unsigned phase = 0;
  char tokens[2];

  int alive() const {
    int sum = 0;
    for (auto& b : blocks) sum += b->alive;
    return sum;
  }
  bool several() const { return blocks.size() > 1; }
};

enum class Order : int { fifo, lifo, random };

// Filled by runtime.py.
struct Launch {
  int grid[3], block, shared_bytes, cluster, dependent, order, inflight, extents;
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
  void (*invoke)(const void* params) = nullptr;
  const void* params = nullptr;

  Fiber* current = nullptr;  // null in the scheduler
  std::vector<Fiber*> ready;
  size_t head = 0;
  std::vector<std::unique_ptr<Cluster>> flying, idle;
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

extern Machine machine;

constexpr size_t kStackBytes = EMU_ASAN ? 256 << 10 : 128 << 10;

std::string place(Site at);
std::string name(const Block& b);
// Why the shared memory of a block is out of reach.
std::string closed(const Block& b);

// Leaves `from` (a fiber, or null: the scheduler) for `to`; returns when somebody comes back.
void change(Fiber* from, Fiber* to);
// The next ready thread, or null.
Fiber* pick();
// Makes f ready.
void wake(Fiber* f);
// The thread is about to run the kernel, or has run it.
void arrive(Fiber* me);
void leave(Fiber* me);
// The thread has returned from the kernel: those who waited only for it go on.
void depart(Fiber* me);
// Fails without a place.
[[noreturn]] void fail(const std::string& text);

// The block of the running thread's cluster in whose shared memory p lies, or null.
Block* owner(const void* p);
// Opens or closes the shared memory of a block.
void reach(Block& b, bool open);

}  // namespace emu
