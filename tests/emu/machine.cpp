// Switching between threads, and the places where they meet. The last to come does the work of all and goes on; the others become
// ready. Lanes of one warp may be in several collectives at once, under disjoint masks.
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace emu {

Running running;
Machine machine;

std::string place(Site at) {
  std::string path = at.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(at.line());
}

std::string name(const Block& b) {
  auto n = [](unsigned x) { return std::to_string(x); };
  return "block (" + n(b.index.x) + ", " + n(b.index.y) + ", " + n(b.index.z) + ")";
}

std::string closed(const Block& b) {
  return b.alive ? "the shared memory of " + name(b) + ", which may not have started: a cluster_barrier comes first"
                 : "the shared memory of " + name(b) + ", which has returned";
}

void fail(Site at, const char* text, ...) {
  Quiet quiet;
  char message[512];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(message, sizeof message, text, arguments);
  va_end(arguments);
  Fiber* me = machine.current;
  machine.error = place(at) + ": " + message + ", " + name(*me->block) + " thread " + std::to_string(me->thread);
  machine.failed = true;
  change(me, nullptr);
  __builtin_unreachable();
}

void fail(const std::string& text) {
  Quiet quiet;
  machine.error = text;
  machine.failed = true;
  change(machine.current, nullptr);
  __builtin_unreachable();
}

// ---- switching

#if EMU_TSAN
__attribute__((no_sanitize("thread")))
#endif
void change(Fiber* from, Fiber* to) {
  machine.counters.switches++;
  machine.current = to;
  if (to) {
    running.thread = static_cast<unsigned>(to->thread);
    running.index = to->block->index;
    running.shared = to->block->memory;
  }
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

Fiber* pick() {
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

void wake(Fiber* f) {
  f->waits = nullptr;
  machine.ready.push_back(f);
  machine.idle_polls = 0;
}

// Gives the processor to another thread, until somebody has made this one ready.
static void park() {
  Fiber* me = machine.current;
  Fiber* next = pick();
  if (next != me) change(me, next);
}

static void step_back() {
  machine.ready.push_back(machine.current);
  park();
}

void waver() {
  Quiet quiet;
  if (machine.order() == Order::random && machine.random() % 4 == 0) step_back();
}

// A thread that polls lets others go on; when nobody makes progress any more the poll is reported. Of the ready threads others
// come first, whatever the order.
void poll(Site at) {
  Quiet quiet;
  if (++machine.idle_polls > 1000000) fail(at, "no progress: what is polled here never changes");
  Fiber* me = machine.current;
  if (Fiber* next = pick()) {
    machine.ready.insert(machine.ready.begin() + static_cast<std::ptrdiff_t>(machine.head), me);
    change(me, next);
  }
}

// ---- warp collectives

static Warp& warp_of(Fiber* f) { return f->block->warps[static_cast<size_t>(f->thread / 32)]; }

static void finish(Warp& warp, size_t i, Fiber* last) {
  Gathering g = warp.open[i];
  warp.open[i] = warp.open.back();
  warp.open.pop_back();
  machine.counters.collectives++;
  g.work(g.arguments, g.have);
  for (int lane = 0; lane < 32; lane++)
    if ((g.have >> lane & 1) && g.lanes[lane] != last) wake(g.lanes[lane]);
}

// What to acquire afterwards, or null.
static const void* gather_quietly(const Kind& kind, unsigned mask, void* argument, Work work, Site at) {
  Quiet quiet;
  Fiber* me = machine.current;
  Warp& warp = warp_of(me);
  unsigned bit = 1u << me->lane();
  if (!(mask & bit)) fail(at, "%s: lane %d is not in its own mask %08x", kind.name, me->lane(), mask);
  if (kind.aligned && (warp.alive & mask) != mask)
    fail(at, "%s: lanes %08x of the mask have returned or do not exist", kind.name, mask & ~warp.alive);
  size_t found = warp.open.size();
  for (size_t i = 0; i < warp.open.size(); i++) {
    Gathering& g = warp.open[i];
    if (g.mask == mask && g.kind == &kind && g.work == work && (!kind.aligned || g.at.line() == at.line()))
      found = i;
    else if (g.mask & bit && g.have & mask)  // each waits for the other
      fail(at, "divergence: lane %d is in %s with mask %08x, lanes %08x wait in %s with mask %08x at %s", me->lane(), kind.name, mask,
           g.have, g.kind->name, g.mask, place(g.at).c_str());
  }
  if (found == warp.open.size()) {
    const char* token = warp.tokens + warp.sequence++ % sizeof warp.tokens;
    warp.open.push_back(Gathering{mask, 0, &kind, at, work, token, {}, {}});
  }
  Gathering& g = warp.open[found];
  g.have |= bit;
  g.arguments[me->lane()] = argument;
  g.lanes[me->lane()] = me;
  const void* token = kind.orders ? g.token : nullptr;
  if (token) release(token);
  if (g.have == (mask & warp.alive)) {
    finish(warp, found, me);
    waver();
  } else {
    me->waits = &kind, me->at = at;
    park();
  }
  return token;
}

void gather(const Kind& kind, unsigned mask, void* argument, Work work, Site at) {
  if (const void* token = gather_quietly(kind, mask, argument, work, at)) acquire(token);
}

// ---- the block's barrier

static void open_barrier(Block& b, Fiber* last) {
  machine.counters.barriers++;
  for (Fiber* f : b.at_barrier) {
    f->result = b.votes;
    if (f != last) wake(f);
  }
  b.at_barrier.clear();
  b.votes = 0;
  b.phase++;
}

// Threads of a block come to one and the same barrier; a barrier of the cluster may stand elsewhere in the code of another block.
static void check_divergence(Fiber* me, const Kind& kind, Site at) {
  Block& b = *me->block;
  Fiber* other = b.at_barrier.empty() ? b.at_cluster_barrier : b.at_barrier.front();
  if (other && (other->kind != &kind || other->at.line() != at.line() || strcmp(other->at.file_name(), at.file_name())))
    fail(at, "divergence: thread %d is in %s, thread %d waits in %s at %s", me->thread, kind.name, other->thread, other->kind->name,
         place(other->at).c_str());
  for (Gathering& g : warp_of(me).open)
    if (g.mask >> me->lane() & 1)
      fail(at, "divergence: lane %d is in %s, lanes %08x wait for it in %s at %s", me->lane(), kind.name, g.have, g.kind->name,
           place(g.at).c_str());
}

static const void* meet(const Kind& kind, bool vote, Site at) {
  Quiet quiet;
  Fiber* me = machine.current;
  Block& b = *me->block;
  check_divergence(me, kind, at);
  // Threads still on their way out of the last phase must not see what this one publishes: two tokens take turns.
  const void* token = &b.tokens[b.phase % 2];
  release(token);
  b.votes += vote;
  me->kind = &kind, me->at = at;
  b.at_barrier.push_back(me);
  if (static_cast<int>(b.at_barrier.size()) == b.alive) {
    open_barrier(b, me);
    waver();
  } else {
    me->waits = &kind;
    park();
  }
  return token;
}

int barrier(const Kind& kind, bool vote, Site at) {
  acquire(meet(kind, vote, at));
  Quiet quiet;
  return machine.current->result;
}

// ---- clusters

int cluster_rank() {
  Quiet quiet;
  return machine.current->block->rank;
}

int cluster_size() {
  Quiet quiet;
  return static_cast<int>(machine.current->block->cluster->blocks.size());
}

static void open_barrier(Cluster& c, Fiber* last) {
  machine.counters.barriers++;
  for (Fiber* f : c.at_barrier)
    if (f != last) wake(f);
  c.at_barrier.clear();
  for (auto& b : c.blocks) b->at_cluster_barrier = nullptr;
  c.phase++;
}

static const void* meet_cluster(const Kind& kind, Site at) {
  Quiet quiet;
  Fiber* me = machine.current;
  Cluster& c = *me->block->cluster;
  check_divergence(me, kind, at);
  const void* token = &c.tokens[c.phase % 2];
  release(token);
  me->kind = &kind, me->at = at;
  c.at_barrier.push_back(me);
  me->block->at_cluster_barrier = me;
  if (static_cast<int>(c.at_barrier.size()) == c.alive()) {
    open_barrier(c, me);
    waver();
  } else {
    me->waits = &kind;
    park();
  }
  return token;
}

void cluster_barrier(const Kind& kind, Site at) { acquire(meet_cluster(kind, at)); }

char* of_block(const void* shared, int rank, Site at) {
  Quiet quiet;
  Block& mine = *machine.current->block;
  auto offset = static_cast<const char*>(shared) - mine.memory;
  if (offset < 0 || offset >= running.shared_bytes)
    fail(at, "of_block: out of bounds: byte %td of %d of the block's own dynamic shared memory", offset, running.shared_bytes);
  int size = static_cast<int>(mine.cluster->blocks.size());
  if (rank < 0 || rank >= size) fail(at, "of_block: rank %d of a cluster of %d", rank, size);
  Block& other = *mine.cluster->blocks[static_cast<size_t>(rank)];
  if (!other.alive) fail(at, "of_block: %s has returned, and its shared memory is gone", name(other).c_str());
  return other.memory + offset;
}

void reach(Block& b, bool open) {
  b.open = open;
#if EMU_ASAN
  auto bytes = static_cast<size_t>(running.shared_bytes);
  open ? __asan_unpoison_memory_region(b.memory, bytes) : __asan_poison_memory_region(b.memory, bytes);
#elif !EMU_TSAN
  b.shared.protect(!open);
#endif
}

Block* owner(const void* p) {
  for (auto& b : machine.current->block->cluster->blocks) {
    auto offset = static_cast<const char*>(p) - b->memory;
    if (offset >= 0 && offset < running.shared_bytes) return b.get();
  }
  return nullptr;
}

void grid_dependency_wait(Site) {
  Quiet quiet;
  machine.current->block->waited = true;
}

// ---- a thread's first and last step

// What others do in the shared memory of a block of a cluster comes after its first thread's beginning and before its last one's
// end, or races with the writes declared here.
struct Step {
  bool several, edge;  // of a cluster of several blocks; the first beginning or the last end
  char *memory, *token;
};

static Step beginning(Fiber* me) {
  Quiet quiet;
  Block& b = *me->block;
  bool first = !b.started;
  b.started = true;
  if (first && b.cluster->several()) reach(b, true);
  return {b.cluster->several(), first, b.memory, &b.start};
}

static Step ending(Fiber* me) {
  Quiet quiet;
  Block& b = *me->block;
  return {b.cluster->several(), b.alive == 1, b.memory, &b.end};
}

void arrive(Fiber* me) {
  Step step = beginning(me);
  if (!step.several) return;
  if (!step.edge) return acquire(step.token);
  declare_write(step.memory, static_cast<size_t>(running.shared_bytes));
  release(step.token);
}

void leave(Fiber* me) {
  Step step = ending(me);
  if (!step.several) return;
  release(step.token);
  if (!step.edge) return;
  acquire(step.token);
  declare_write(step.memory, static_cast<size_t>(running.shared_bytes));
}

void depart(Fiber* me) {
  Block& b = *me->block;
  Cluster& c = *b.cluster;
  Warp& warp = warp_of(me);
  unsigned bit = 1u << me->lane();
  warp.alive &= ~bit;
  b.alive--;
  me->done = true;
  machine.idle_polls = 0;
  for (size_t i = 0; i < warp.open.size();) {
    Gathering& g = warp.open[i];
    if (g.mask & bit && g.kind->aligned)
      fail(g.at, "%s: lanes %08x wait for lane %d, which has returned", g.kind->name, g.have, me->lane());
    if (g.have == (g.mask & warp.alive))
      finish(warp, i, me), i = 0;
    else
      i++;
  }
  if (b.alive && static_cast<int>(b.at_barrier.size()) == b.alive) open_barrier(b, me);
  if (!b.alive && c.several()) reach(b, false);
  if (!b.alive && machine.launch.dependent && !b.waited)
    fail(name(b) + " returned without grid_dependency_wait, and the launch depends on the one before");
  if (c.alive() && static_cast<int>(c.at_barrier.size()) == c.alive()) open_barrier(c, me);
}

}  // namespace emu
