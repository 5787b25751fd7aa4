// Asynchronous copies, atomics, fences. A copy poisons its destination when it starts and takes place when its group is waited
// for, so that neither a missing wait nor a stage refilled too early goes unnoticed.
//
// Order between blocks, for the race detector: a fence fixes what its thread has done and seen so far; the thread's later atomics
// publish that, and no more. A thread that has read or changed a flag atomically has seen what was published there only after its
// next fence. Barriers hand both on to the rest of the block.
#pragma once
#include "builtins.h"

namespace emu {

template <class V>
V read_atomically(const V* p) {
  V v;
  __atomic_load(const_cast<V*>(p), &v, __ATOMIC_RELAXED);
  return v;
}

// The old value at p, which becomes change(old).
template <class V, class Change>
V atomically(V* p, Change change, Site at) {
  before_atomic(p, sizeof(V), at);
  V old = read_atomically(p), next = change(old);
  __atomic_store(p, &next, __ATOMIC_RELAXED);
  after_atomic(p);
  return old;
}

template <class V>
V read_vector(const void* global, const char* what, Site at) {
  check_global(global, sizeof(V), what, at);
  declare_read(global, sizeof(V));
  V v;
  __builtin_memcpy(&v, global, sizeof(V));
  return v;
}
}  // namespace emu

// ---- as in prims.cuh

inline void cp_async16(void* shared, const void* global, bool valid, EMU_HERE) {
  emu::start_copy(shared, global, 16, valid, at);
}
inline void cp_async4(void* shared, const void* global, EMU_HERE) { emu::start_copy(shared, global, 4, true, at); }
inline void cp_async_commit() { emu::close_group(); }

template <int N>
void cp_async_wait() {
  static_assert(N >= 0, "a number of groups");
  emu::land_groups(N);
}

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
  emu::after_atomic(global);
}

// ---- as in CUDA

inline void __threadfence() { emu::fence(); }
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

// ---- as in prims.cuh

inline unsigned atomic_inc_acq_rel(unsigned* p, unsigned most, EMU_HERE) {
  emu::fence();
  const unsigned before = atomicInc(p, most, at);
  emu::fence();
  return before;
}
