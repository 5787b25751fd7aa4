// Runs one grid to its end, or to the first error: starts blocks, lets threads go on, turns a fault of the processor into a report.
#include <signal.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "machine.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace emu {

[[noreturn]] static void thread_main() {
  Fiber* me = machine.current;
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  acquire(&machine.start);
  arrive(me);
  machine.invoke(machine.params);
  leave(me);
  release(&machine.end);
  Fiber* next = nullptr;
  {
    Quiet quiet;
    depart(me);
    if (me->block->alive) next = pick();  // a finished block is taken down by the scheduler
  }
  change(me, next);
  __builtin_unreachable();
}

static void start(Block& b, Cluster& cluster, int rank, dim3 index) {
  const Launch& l = machine.launch;
  b.index = index, b.cluster = &cluster, b.rank = rank;
  b.started = b.waited = false;
  b.alive = l.block;
  b.fibers.resize(static_cast<size_t>(l.block));
  b.warps.resize(static_cast<size_t>(l.block + 31) / 32);
  b.at_barrier.clear(), b.at_cluster_barrier = nullptr;
  b.votes = 0;
  // The end of the shared memory lies at the end of a page, as near as its alignment allows.
  auto bytes = static_cast<size_t>(l.shared_bytes), rounded = (bytes + 127) / 128 * 128;
  if (EMU_TSAN || b.shared.bytes() < rounded || !b.memory) b.shared = Mapping(rounded + !rounded);
  if (!b.open) reach(b, true);
  b.memory = b.shared.end() - rounded;
#if EMU_ASAN
  __asan_unpoison_memory_region(b.shared.begin(), b.shared.bytes());
#endif
  memset(b.memory, 0xff, rounded);
#if EMU_ASAN
  __asan_poison_memory_region(b.shared.begin(), static_cast<size_t>(b.memory - b.shared.begin()));
  __asan_poison_memory_region(b.memory + bytes, rounded - bytes);
#endif
  if (cluster.several()) reach(b, false);
  for (Warp& w : b.warps) w.alive = 0, w.open.clear();
  for (size_t i = 0; i < b.fibers.size(); i++) {
    Fiber& f = b.fibers[i];
    // Fresh memory for every stack, so that the race detector does not compare two threads' locals.
    if (EMU_TSAN || !f.stack.bytes()) f.stack = Mapping(kStackBytes);
    f.block = &b, f.thread = static_cast<int>(i), f.done = false, f.waits = nullptr, f.fenced = false, f.group = 0;
    f.copies.clear(), f.flags.clear();
    b.warps[i / 32].alive |= 1u << i % 32;
#if EMU_ASAN
    __asan_unpoison_memory_region(f.stack.begin(), f.stack.bytes());  // the last thread's frames may have left it closed
#endif
#if EMU_TSAN
    f.tsan = __tsan_create_fiber(0);
#endif
    f.context.prepare(f.stack.begin(), f.stack.bytes(), thread_main);
    machine.ready.push_back(&f);
  }
}

// The blocks of cluster (x, y, z); its rank in x is that of its blocks divided by their number.
static void start(Cluster& c, dim3 at) {
  auto size = static_cast<size_t>(machine.launch.cluster);
  c.at_barrier.clear();
  c.blocks.resize(size);
  for (auto& b : c.blocks)
    if (!b) b = std::make_unique<Block>();
  for (size_t i = 0; i < size; i++) start(*c.blocks[i], c, static_cast<int>(i), {static_cast<unsigned>(at.x * size + i), at.y, at.z});
}

// Keeps the memory of a cluster that has ended for the next one.
static bool land(std::unique_ptr<Cluster>& c) {
#if EMU_TSAN
  // Where a grid failed, threads stand inside a Quiet, and to destroy such a one is an error.
  for (auto& b : c->blocks)
    for (Fiber& f : b->fibers)
      if (f.done) __tsan_destroy_fiber(f.tsan);
#endif
  machine.idle.push_back(std::move(c));
  return true;
}

// Who waits where, threads of the same place together.
static std::string deadlock() {
  std::string text = "deadlock:";
  int lines = 0;
  std::vector<Block*> blocks;
  for (auto& c : machine.flying)
    for (auto& b : c->blocks) blocks.push_back(b.get());
  for (Block* b : blocks) {
    std::map<std::string, std::vector<int>> places;
    for (Fiber& f : b->fibers)
      if (!f.done) places[f.waits ? std::string(f.waits->name) + " at " + place(f.at) : "nothing"].push_back(f.thread);
    for (auto& [where, threads] : places) {
      if (lines++ == 8) return text + " ...";
      text += " [" + name(*b) + ": ";
      for (size_t i = 0; i < threads.size();) {
        size_t k = i;
        while (k + 1 < threads.size() && threads[k + 1] == threads[k] + 1) k++;
        text += (i ? "," : "") + std::to_string(threads[i]) + (k > i ? "-" + std::to_string(threads[k]) : "");
        i = k + 1;
      }
      text += threads.size() == 1 ? " waits in " : " wait in ";
      text += where + "]";
    }
  }
  return text;
}

// ---- faults

#if !EMU_ASAN && !EMU_TSAN
// The block of the running thread's cluster whose shared memory, closed or with the pages around it, p lies in.
static Block* near(const char* p) {
  for (auto& b : machine.current->block->cluster->blocks)
    if (b->shared.guards(p) || (p >= b->shared.begin() && p < b->shared.end() && !(b->started && b->alive))) return b.get();
  return nullptr;
}

static void on_fault(int signal, siginfo_t* info, [[maybe_unused]] void* context) {
  Fiber* me = machine.current;
  if (!me) {
    ::signal(signal, SIG_DFL);
    return;
  }
#if defined(__x86_64__)
  machine.fault = reinterpret_cast<const void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#endif
  char buffer[200];
  auto* p = static_cast<const char*>(info->si_addr);
  if (signal == SIGILL)
    snprintf(buffer, sizeof buffer, "undefined behaviour: misaligned access, index of an array, shift or division");
  else if (signal == SIGFPE)
    snprintf(buffer, sizeof buffer, "integer division by zero");
  else if (me->stack.guards(p))
    snprintf(buffer, sizeof buffer, "the emulator's stack of a thread is too small");
  else if (Block* b = near(p); b && b->shared.guards(p))
    snprintf(buffer, sizeof buffer, "out of bounds: byte %td of %d of the dynamic shared memory%s", p - b->memory,
             machine.launch.shared_bytes, b == me->block ? "" : (" of " + name(*b)).c_str());
  else if (b)
    snprintf(buffer, sizeof buffer, "%s", closed(*b).c_str());
  else
    snprintf(buffer, sizeof buffer, "out of bounds: no access to address %p", static_cast<const void*>(p));
  machine.error = std::string(buffer) + ", " + name(*me->block) + " thread " + std::to_string(me->thread);
  machine.failed = true;
  change(me, nullptr);
}
#endif

// Catches faults, and flushes subnormals as the kernels are compiled to, for as long as it lives.
class Environment {
 public:
  Environment() {
#if !EMU_ASAN && !EMU_TSAN
    static char stack[64 << 10];
    stack_t mine{};
    mine.ss_sp = stack, mine.ss_size = sizeof stack;
    sigaltstack(&mine, &stack_);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; i++) sigaction(kSignals[i], &action, &before_[i]);
#endif
#if defined(__x86_64__)
    control_ = _mm_getcsr();
    _mm_setcsr(control_ | 0x8040);
#endif
  }
  ~Environment() {
#if defined(__x86_64__)
    _mm_setcsr(control_);
#endif
#if !EMU_ASAN && !EMU_TSAN
    for (int i = 0; i < 4; i++) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_, nullptr);
#endif
  }

 private:
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  struct sigaction before_[4];
  stack_t stack_;
  unsigned control_ = 0;
};

// ---- the grid

static void schedule() {
  Machine& m = machine;
  auto [wide, high, deep] = running.grid;
  auto total = static_cast<uint64_t>(wide) * high * deep;
  auto size = static_cast<unsigned>(m.launch.cluster);
  wide /= size, total /= size;
  std::vector<uint64_t> blocks(total);  // or clusters of them
  for (uint64_t i = 0; i < total; i++) blocks[i] = m.order() == Order::lifo ? total - 1 - i : i;
  if (m.order() == Order::random)
    for (uint64_t i = total; i > 1; i--) std::swap(blocks[i - 1], blocks[m.random() % i]);
  uint64_t next = 0;
  while (true) {
    std::erase_if(m.flying, [](std::unique_ptr<Cluster>& c) { return !c->alive() && land(c); });
    while (next < total && m.flying.size() * size < static_cast<size_t>(m.launch.inflight)) {
      if (m.idle.empty()) m.idle.push_back(std::make_unique<Cluster>());
      m.flying.push_back(std::move(m.idle.back()));
      m.idle.pop_back();
      uint64_t i = blocks[next++];
      auto narrow = [](uint64_t v) { return static_cast<unsigned>(v); };
      start(*m.flying.back(), {narrow(i % wide), narrow(i / wide % high), narrow(i / wide / high)});
    }
    Fiber* f = pick();
    if (!f) {
      if (!m.flying.empty()) m.failed = true, m.error = deadlock();
      return;
    }
    change(nullptr, f);
    m.current = nullptr;
    if (m.failed) return;
  }
}

static const char* run(const Launch& launch, void (*invoke)(const void*), const void* params) {
  Quiet quiet;
  Machine& m = machine;
  m.launch = launch;
  auto size = [&](int i) { return static_cast<unsigned>(launch.grid[i]); };
  running.grid = {size(0), size(1), size(2)};
  running.block = {static_cast<unsigned>(launch.block), 1, 1};
  running.shared_bytes = launch.shared_bytes;
  m.invoke = invoke, m.params = params;
  m.counters = {}, m.conflicts.clear();
  m.failed = false, m.error.clear(), m.fault = nullptr, m.idle_polls = 0;
  m.state = launch.seed * 2 + 1;
  m.ready.clear(), m.head = 0;
#if EMU_TSAN
  m.scheduler_tsan = __tsan_get_current_fiber();
#endif
#if EMU_ASAN
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* stack;
  pthread_attr_getstack(&attributes, &stack, &m.scheduler_stack_bytes);
  pthread_attr_destroy(&attributes);
  m.scheduler_stack = stack;
#endif
  release(&m.start);
  {
    Environment environment;
    schedule();
  }
  acquire(&m.end);
  for (auto& c : m.flying) land(c);
  m.flying.clear();
  return m.failed ? m.error.c_str() : nullptr;
}

}  // namespace emu

// ---- for runtime.py

using namespace emu;

// Returns what went wrong, or null.
extern "C" const char* emu_run(const Launch* launch, void (*invoke)(const void*), const void* params) {
  return run(*launch, invoke, params);
}

extern "C" const void* emu_fault() { return machine.fault; }

extern "C" void emu_counters(uint64_t* out) { memcpy(out, &machine.counters, sizeof(Counters)); }

extern "C" int emu_conflict(int i, uint64_t* out, char* where, size_t bytes) {
  if (i >= static_cast<int>(machine.conflicts.size())) return 0;
  const Conflict& c = machine.conflicts[static_cast<size_t>(i)];
  out[0] = c.phases, out[1] = c.extra;
  snprintf(where, bytes, "%s", place(c.at).c_str());
  return 1;
}
