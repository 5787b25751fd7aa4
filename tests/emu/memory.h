// Asynchronous copies, atomics, fences. A copy poisons its destination when it starts and takes place when its group is waited
// for, so that neither a missing wait nor a stage refilled too early goes unnoticed.
//
// Order between blocks, for the race detector: a fence fixes what its thread has done and seen so far; the thread's later atomics
// publish that, and no more. A thread that has read or changed a flag atomically has seen what was published there only after its
// next fence. Barriers hand both on to the rest of the block.
#pragma once
#include "collective.h"

namespace emu {

inline void check_global(const void* p, int bytes, const char* what, Site at) {
  Quiet quiet;
  auto first = reinterpret_cast<uint64_t>(p);
  if (first % static_cast<uint64_t>(bytes)) fail(at, "%s: global address %p is not aligned to %d bytes", what, p, bytes);
  const Launch& l = machine.launch;
  for (int i = 0; i < l.extents; i++)
    if (first >= l.extent[2 * i] && first + static_cast<uint64_t>(bytes) <= l.extent[2 * i + 1]) return;
  if (l.extents) fail(at, "%s: %d bytes at %p lie outside the tensors", what, bytes, p);
}

EMU_UNSEEN bool in_shared(const void* p) {
  auto offset = static_cast<const char*>(p) - machine.current->block->memory;
  return offset >= 0 && offset < machine.launch.shared_bytes;
}

inline void check_shared(const void* p, int bytes, const char* what, Site at) {
  Quiet quiet;
  auto* c = static_cast<const char*>(p);
  auto offset = c - machine.current->block->memory;
  int have = machine.launch.shared_bytes;
  if (offset < 0 || offset + bytes > have) fail(at, "%s: byte %td of %d of the dynamic shared memory", what, offset, have);
  if (offset % bytes) fail(at, "%s: byte %td of the shared memory is not aligned to %d bytes", what, offset, bytes);
}

inline void land(const Copy& c) {
  if (c.valid) {
    declare_read(c.from, 16);
    __builtin_memcpy(c.to, c.from, 16);
  } else {
    __builtin_memset(c.to, 0, 16);
  }
  declare_write(c.to, 16);
}

// Takes this thread's copies of groups before `group` off its list.
inline std::vector<Copy> due_before(int group) {
  Quiet quiet;
  auto& copies = machine.current->copies;
  auto last = std::find_if(copies.begin(), copies.end(), [=](const Copy& c) { return c.group >= group; });
  std::vector<Copy> due(copies.begin(), last);
  copies.erase(copies.begin(), last);
  return due;
}

EMU_UNSEEN int group() { return machine.current->group; }

// A thread that polls lets others go on; when nobody makes progress any more the poll is reported.
inline void poll(Site at) {
  Quiet quiet;
  if (++machine.idle_polls > 1000000) fail(at, "no progress: the flag polled here is never set");
  step_back();
}

// Makes what the thread had done at its last fence visible to whoever acquires `flag`.
EMU_UNSEEN void publish([[maybe_unused]] const void* flag) {
#if EMU_TSAN
  // By a messenger that knows nothing else: a thread's own release would publish what came after the fence too.
  void* me = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(machine.scheduler_tsan, 1);
  void* messenger = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(messenger, 1);
  __tsan_acquire(&machine.current->fence);
  __tsan_release(const_cast<void*>(flag));
  __tsan_switch_to_fiber(me, 1);
  __tsan_destroy_fiber(messenger);
#endif
}

template <class V>
V read_atomically(const V* p) {
  V v;
  __atomic_load(const_cast<V*>(p), &v, __ATOMIC_RELAXED);
  return v;
}

// The old value at p, which becomes change(old).
template <class V, class Change>
V atomically(V* p, Change change, Site at) {
  if (!in_shared(p)) check_global(p, sizeof(V), "atomic", at);
  {
    Quiet quiet;
    waver();
    if (EMU_TSAN && machine.current->fenced) publish(p);
  }
  V old = read_atomically(p), next = change(old);
  __atomic_store(p, &next, __ATOMIC_RELAXED);
  {
    Quiet quiet;
    machine.idle_polls = 0;
    if (EMU_TSAN) machine.current->flags.push_back(p);
    waver();
  }
  return old;
}

}  // namespace emu

// ---- as in prims.cuh

inline void cp_async16(void* shared, const void* global, bool valid, EMU_HERE) {
  emu::check_shared(shared, 16, "cp.async", at);
  if (valid)
    emu::check_global(global, 16, "cp.async", at);
  else if (reinterpret_cast<uintptr_t>(global) % 16)
    emu::fail(at, "cp.async: global address %p is not aligned to 16 bytes", global);
  __builtin_memset(shared, 0xff, 16);
  emu::declare_write(shared, 16);
  emu::Quiet quiet;
  emu::machine.counters.copies++;
  emu::Fiber& me = emu::self();
  me.copies.push_back({shared, global, valid, me.group});
}

inline void cp_async_commit() {
  emu::Quiet quiet;
  emu::self().group++;
}

template <int N>
void cp_async_wait() {
  static_assert(N >= 0, "a number of groups");
  for (const emu::Copy& copy : emu::due_before(emu::group() - N)) emu::land(copy);
}

namespace emu {
template <class V>
V read_vector(const void* global, const char* what, Site at) {
  check_global(global, sizeof(V), what, at);
  declare_read(global, sizeof(V));
  V v;
  __builtin_memcpy(&v, global, sizeof(V));
  return v;
}
}  // namespace emu

inline uint4 ld_stream16(const void* global, EMU_HERE) { return emu::read_vector<uint4>(global, "ld_stream16", at); }
inline float4 ld_l2_16(const void* global, EMU_HERE) { return emu::read_vector<float4>(global, "ld_l2_16", at); }
inline float2 ld_l2_8(const void* global, EMU_HERE) { return emu::read_vector<float2>(global, "ld_l2_8", at); }

inline int ld_acquire(const int* global, EMU_HERE) {
  emu::poll(at);
  int v = emu::read_atomically(global);
  emu::acquire(global);
  return v;
}

inline void st_release(int* global, int v, EMU_HERE) {
  emu::check_global(global, 4, "st_release", at);
  emu::release(global);
  __atomic_store_n(global, v, __ATOMIC_RELAXED);
  emu::Quiet quiet;
  emu::machine.idle_polls = 0;
  emu::waver();
}

// ---- as in CUDA

inline void __threadfence() {
  emu::Quiet quiet;
  emu::Fiber& me = emu::self();
  for (const void* flag : me.flags) emu::acquire(flag);
  me.flags.clear();
  me.fenced = true;
  emu::release(&me.fence);
}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned, EMU_HERE) { emu::poll(at); }

#define EMU_ATOMIC(name, expression)                                                  \
  template <class V>                                                                  \
  V name(V* p, std::type_identity_t<V> v, EMU_HERE) {                                 \
    return emu::atomically(p, [v](V old) { return static_cast<V>(expression); }, at); \
  }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef EMU_ATOMIC

template <class V>
V atomicCAS(V* p, std::type_identity_t<V> compare, std::type_identity_t<V> v, EMU_HERE) {
  return emu::atomically(p, [=](V old) { return old == compare ? v : old; }, at);
}

template <class V>
V __ldg(const V* p) { return *p; }
template <class V>
V __ldcg(const V* p) { return *p; }
template <class V>
V __ldcs(const V* p) { return *p; }
template <class V>
void __stcg(V* p, std::type_identity_t<V> v) { *p = v; }
template <class V>
void __stcs(V* p, std::type_identity_t<V> v) { *p = v; }
