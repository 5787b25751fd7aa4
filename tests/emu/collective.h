// Where threads meet: block barriers and warp collectives. The last to come does the work of all and goes on; the others become
// ready. Lanes of one warp may be in several collectives at once, under disjoint masks.
#pragma once
#include <algorithm>

#include "machine.h"

namespace emu {

inline void wake(Fiber* f) {
  f->waits = nullptr;
  machine.ready.push_back(f);
  machine.idle_polls = 0;
}

// Waits until woken; what was published on the thread's token then has happened before.
inline void wait_in(const Kind& kind, Site at) {
  Fiber* me = machine.current;
  me->waits = &kind, me->at = at;
  park();
}

inline Warp& warp_of(Fiber* f) { return f->block->warps[static_cast<size_t>(f->thread / 32)]; }

inline void finish(Warp& warp, size_t i, Fiber* last) {
  Gathering g = warp.open[i];
  warp.open[i] = warp.open.back();
  warp.open.pop_back();
  machine.counters.collectives++;
  g.work(g.arguments, g.have);
  for (int lane = 0; lane < 32; lane++)
    if ((g.have >> lane & 1) && g.lanes[lane] != last) wake(g.lanes[lane]);
}

// Meets the other lanes of the mask; the last runs work(arguments by lane, lanes present).
inline void gather(const Kind& kind, unsigned mask, void* argument, void (*work)(void* const*, unsigned), Site at) {
  {
    Quiet quiet;
    Fiber* me = machine.current;
    Warp& warp = warp_of(me);
    unsigned bit = 1u << me->lane();
    if (!(mask & bit)) fail(at, "%s: lane %d is not in its own mask %08x", kind.name, me->lane(), mask);
    if (kind.aligned && (warp.alive & mask) != mask)
      fail(at, "%s: lanes %08x of the mask have exited or do not exist", kind.name, mask & ~warp.alive);
    size_t found = warp.open.size();
    for (size_t i = 0; i < warp.open.size(); i++) {
      Gathering& g = warp.open[i];
      if (g.mask == mask && g.kind == &kind && g.work == work && (!kind.aligned || g.at.line() == at.line())) {
        found = i;
      } else if (g.have & mask) {
        fail(at, "divergence: lane %d is in %s with mask %08x, lanes %08x wait in %s with mask %08x at %s", me->lane(), kind.name,
             mask, g.have, g.kind->name, g.mask, place(g.at).c_str());
      }
    }
    if (found == warp.open.size()) {
      const char* token = warp.tokens + warp.sequence++ % sizeof warp.tokens;
      warp.open.push_back(Gathering{mask, 0, &kind, at, work, token, {}, {}});
    }
    Gathering& g = warp.open[found];
    g.have |= bit;
    g.arguments[me->lane()] = argument;
    g.lanes[me->lane()] = me;
    me->token = g.token;
    if (kind.orders) release(me->token);
    if (g.have == (mask & warp.alive)) {
      finish(warp, found, me);
      waver();
    } else {
      wait_in(kind, at);
    }
  }
  if (kind.orders) acquire(self().token);
}

// ---- the block's barrier

inline void open_barrier(Block& b, Fiber* last) {
  machine.counters.barriers++;
  for (Fiber* f : b.at_barrier) {
    f->result = b.votes;
    if (f != last) wake(f);
  }
  b.at_barrier.clear();
  b.votes = 0;
  b.phase++;
}

// Returns how many threads of the block voted.
inline int barrier(const Kind& kind, bool vote, Site at) {
  {
    Quiet quiet;
    Fiber* me = machine.current;
    Block& b = *me->block;
    if (!b.at_barrier.empty()) {
      Fiber* other = b.at_barrier.front();
      const Kind* theirs = other->waits;
      if (theirs != &kind || other->at.line() != at.line() || place(other->at) != place(at))
        fail(at, "divergence: thread %d is in %s, thread %d waits in %s at %s", me->thread, kind.name, other->thread, theirs->name,
             place(other->at).c_str());
    }
    for (Gathering& g : warp_of(me).open)
      if (g.mask >> me->lane() & 1 && kind.aligned)
        fail(at, "divergence: lane %d is in %s, lanes %08x wait for it in %s at %s", me->lane(), kind.name, g.have, g.kind->name,
             place(g.at).c_str());
    // Threads still on their way out of the last phase must not see what this one publishes: two tokens take turns.
    me->token = &b.tokens[b.phase % 2];
    release(me->token);
    b.votes += vote;
    b.at_barrier.push_back(me);
    if (static_cast<int>(b.at_barrier.size()) == b.alive) {
      open_barrier(b, me);
      waver();
    } else {
      wait_in(kind, at);
    }
  }
  acquire(self().token);
  Quiet quiet;
  return self().result;
}

// A thread has returned from the kernel: those who waited only for it go on.
inline void depart(Fiber* me) {
  Block& b = *me->block;
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
    if (g.have == (g.mask & warp.alive)) {
      finish(warp, i, me);
      i = 0;
    } else {
      i++;
    }
  }
  if (b.alive && static_cast<int>(b.at_barrier.size()) == b.alive) open_barrier(b, me);
}

}  // namespace emu

#define EMU_HERE std::source_location at = std::source_location::current()

namespace emu {
inline constexpr Kind kSyncthreads{"__syncthreads", true, true}, kSyncthreadsCount{"__syncthreads_count", true, true},
    kSyncthreadsAnd{"__syncthreads_and", true, true}, kSyncthreadsOr{"__syncthreads_or", true, true},
    kSyncwarp{"__syncwarp", false, true}, kShfl{"__shfl_sync", false, false}, kShflXor{"__shfl_xor_sync", false, false},
    kShflUp{"__shfl_up_sync", false, false}, kShflDown{"__shfl_down_sync", false, false}, kBallot{"__ballot_sync", false, false},
    kMatch{"__match_any_sync", false, false}, kReduce{"__reduce_sync", false, false};
}

inline void __syncthreads(EMU_HERE) { emu::barrier(emu::kSyncthreads, false, at); }
inline int __syncthreads_count(int vote, EMU_HERE) { return emu::barrier(emu::kSyncthreadsCount, vote != 0, at); }
inline int __syncthreads_or(int vote, EMU_HERE) { return emu::barrier(emu::kSyncthreadsOr, vote != 0, at) != 0; }
inline int __syncthreads_and(int vote, EMU_HERE) { return emu::barrier(emu::kSyncthreadsAnd, vote == 0, at) == 0; }

inline void __syncwarp(unsigned mask = ~0u, EMU_HERE) {
  emu::gather(emu::kSyncwarp, mask, nullptr, [](void* const*, unsigned) {}, at);
}

namespace emu {

template <class V>
V shuffle(const Kind& kind, unsigned mask, V value, int source, Site at) {
  static_assert(sizeof(V) <= 8, "one register or two");
  struct Argument {
    V value, result;
    int source;
    Site at;
  } mine{value, value, source, at};
  gather(kind, mask, &mine, [](void* const* arguments, unsigned lanes) {
    for (int i = 0; i < 32; i++) {
      if (!(lanes >> i & 1)) continue;
      auto* a = static_cast<Argument*>(arguments[i]);
      if (!(lanes >> a->source & 1))
        fail(a->at, "shuffle: lane %d reads lane %d, which is not in the mask or has returned", i, a->source);
      a->result = static_cast<Argument*>(arguments[a->source])->value;
    }
  }, at);
  Quiet quiet;
  return mine.result;
}

EMU_UNSEEN int lane() { return machine.current->lane(); }

// One result for all lanes: fold(values, lanes).
template <class V, class R>
R vote(const Kind& kind, unsigned mask, V value, R (*fold)(const V*, unsigned), Site at) {
  struct Argument {
    V value;
    R result;
    R (*fold)(const V*, unsigned);
  } mine{value, {}, fold};
  gather(kind, mask, &mine, [](void* const* arguments, unsigned lanes) {
    V values[32]{};
    Argument* a = nullptr;
    for (int i = 0; i < 32; i++)
      if (lanes >> i & 1) a = static_cast<Argument*>(arguments[i]), values[i] = a->value;
    R result = a->fold(values, lanes);
    for (int i = 0; i < 32; i++)
      if (lanes >> i & 1) static_cast<Argument*>(arguments[i])->result = result;
  }, at);
  Quiet quiet;
  return mine.result;
}

}  // namespace emu

template <class V>
V __shfl_sync(unsigned mask, V value, int source, int width = 32, EMU_HERE) {
  return emu::shuffle(emu::kShfl, mask, value, (emu::lane() & ~(width - 1)) | (source & (width - 1)), at);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits, int width = 32, EMU_HERE) {
  int lane = emu::lane(), source = lane ^ bits;
  return emu::shuffle(emu::kShflXor, mask, value, source > (lane | (width - 1)) || source > 31 ? lane : source, at);
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned delta, int width = 32, EMU_HERE) {
  int lane = emu::lane(), source = lane - static_cast<int>(delta);
  return emu::shuffle(emu::kShflUp, mask, value, source < (lane & ~(width - 1)) ? lane : source, at);
}
template <class V>
V __shfl_down_sync(unsigned mask, V value, unsigned delta, int width = 32, EMU_HERE) {
  int lane = emu::lane(), source = lane + static_cast<int>(delta);
  return emu::shuffle(emu::kShflDown, mask, value, source > (lane | (width - 1)) ? lane : source, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_HERE) {
  return emu::vote<int, unsigned>(emu::kBallot, mask, predicate, [](const int* values, unsigned lanes) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (lanes >> i & 1) && values[i] ? 1u << i : 0;
    return r;
  }, at);
}
inline int __any_sync(unsigned mask, int predicate, EMU_HERE) { return __ballot_sync(mask, predicate, at) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMU_HERE) { return __ballot_sync(mask, !predicate, at) == 0; }

template <class V>
unsigned __match_any_sync(unsigned mask, V value, EMU_HERE) {
  struct Argument {
    V value;
    unsigned result;
  } mine{value, 0};
  emu::gather(emu::kMatch, mask, &mine, [](void* const* arguments, unsigned lanes) {
    for (int i = 0; i < 32; i++)
      for (int k = 0; k < 32; k++)
        if ((lanes >> i & 1) && (lanes >> k & 1)) {
          auto *a = static_cast<Argument*>(arguments[i]), *b = static_cast<Argument*>(arguments[k]);
          a->result |= memcmp(&a->value, &b->value, sizeof(V)) == 0 ? 1u << k : 0;
        }
  }, at);
  emu::Quiet quiet;
  return mine.result;
}

#define EMU_REDUCE(name, expression)                                                             \
  template <class V>                                                                             \
  V name(unsigned mask, V value, EMU_HERE) {                                                     \
    static_assert(sizeof(V) == 4 && V(0.5f) == 0, "int or unsigned");                            \
    return emu::vote<V, V>(emu::kReduce, mask, value, [](const V* values, unsigned lanes) {      \
      bool first = true;                                                                         \
      V a{};                                                                                     \
      for (int i = 0; i < 32; i++) {                                                             \
        if (!(lanes >> i & 1)) continue;                                                         \
        V b = values[i];                                                                         \
        a = first ? b : static_cast<V>(expression);                                              \
        first = false;                                                                           \
      }                                                                                          \
      return a;                                                                                  \
    }, at);                                                                                      \
  }
EMU_REDUCE(__reduce_add_sync, static_cast<unsigned>(a) + static_cast<unsigned>(b))
EMU_REDUCE(__reduce_min_sync, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, a & b)
EMU_REDUCE(__reduce_or_sync, a | b)
EMU_REDUCE(__reduce_xor_sync, a ^ b)
#undef EMU_REDUCE
