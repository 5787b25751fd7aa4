// The barriers, shuffles and votes of CUDA.
#pragma once
#include "builtins.h"

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

// ---- as in prims.cuh

namespace emu {
inline constexpr Kind kClusterBarrier{"cluster_barrier", true, true};
}

inline int cluster_rank() { return emu::cluster_rank(); }
inline int cluster_size() { return emu::cluster_size(); }
inline void cluster_barrier(EMU_HERE) { emu::cluster_barrier(emu::kClusterBarrier, at); }

template <class T>
T* of_block(T* shared, int rank, EMU_HERE) {
  return reinterpret_cast<T*>(emu::of_block(shared, rank, at));
}

inline void grid_dependency_wait(EMU_HERE) { emu::grid_dependency_wait(at); }
inline void grid_dependency_launch() {}

// ---- as in CUDA

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
          a->result |= __builtin_memcmp(&a->value, &b->value, sizeof(V)) == 0 ? 1u << k : 0;
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
