// What kernel code sees of the emulator: who runs, how threads meet, how a mistake is reported. Light on purpose, since every
// configuration of every kernel compiles it; the machine behind is compiled once.
#pragma once
#include <source_location>
#include <stdint.h>
#include <type_traits>

#include "sanitizers.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define EMU_HERE std::source_location at = std::source_location::current()

namespace emu {

using Site = std::source_location;

// What a thread waits in. aligned: every lane of the mask must take part, from the same place. orders: memory accesses before
// it happen before those after it.
struct Kind {
  const char* name;
  bool aligned, orders;
};

// The thread that has the processor; the machine keeps it up to date.
struct Running {
  dim3 grid, block, index;  // index of the block
  unsigned thread;
  char* shared;  // the block's dynamic shared memory
  int shared_bytes;
};
extern Running running;

EMU_UNSEEN int lane() { return static_cast<int>(running.thread % 32); }
EMU_UNSEEN unsigned thread() { return running.thread; }
EMU_UNSEEN char* shared_memory() { return running.shared; }

// Ends the grid with an error; whatever else its threads would have done is dropped.
[[noreturn]] void fail(Site at, const char* text, ...) __attribute__((format(printf, 2, 3)));

// Meets the other lanes of the mask; the last runs work(arguments by lane, lanes present), then all go on.
using Work = void (*)(void* const* arguments, unsigned lanes);
void gather(const Kind& kind, unsigned mask, void* argument, Work work, Site at);

// Meets the other threads of the block; returns how many voted.
int barrier(const Kind& kind, bool vote, Site at);

void check_global(const void* p, int bytes, const char* what, Site at);
void check_shared(const void* p, int bytes, const char* what, Site at);

// Clusters of blocks: the rank of the thread's, their number, the meeting of all their threads, and the address of the same
// byte in the shared memory of another.
int cluster_rank();
int cluster_size();
void cluster_barrier(const Kind& kind, Site at);
char* of_block(const void* shared, int rank, Site at);

// The launch before is over, for this thread.
void grid_dependency_wait(Site at);

// Asynchronous copies of 4 or 16 bytes.
void start_copy(void* shared, const void* global, int bytes, bool valid, Site at);
void close_group();
void land_groups(int pending);  // completes all but the latest `pending` groups

// Order between blocks.
void fence();
void poll(Site at);
void before_atomic(const void* p, int bytes, Site at);
void after_atomic(const void* p);

// A thread that is between two steps of its own; in a random schedule others sometimes go first.
void waver();

}  // namespace emu
