// What all threads of a block of `select` do together: scans, and runs of rows written one behind the other.
#pragma once
#include "prims.cuh"

#ifndef SAAP_THREADS
#define SAAP_THREADS 1024
#endif

namespace {

constexpr int kThreads = SAAP_THREADS, kWarps = kThreads / 32;
constexpr u32 kAllLanes = 0xffffffffu;

// Two counts at once: rows, and mass (a share of the attention, or simply one).
struct Measure {
  u32 rows, mass;
};

__device__ __forceinline__ Measure operator+(Measure x, Measure y) { return {x.rows + y.rows, x.mass + y.mass}; }

__device__ __forceinline__ Measure inclusive_scan_warp(Measure x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u32 rows = __shfl_up_sync(kAllLanes, x.rows, step), mass = __shfl_up_sync(kAllLanes, x.mass, step);
    if (lane >= step) x = x + Measure{rows, mass};
  }
  return x;
}

// The sum of x over the threads before this one; total: over all. scratch (kWarps) is free again when this returns.
__device__ __forceinline__ Measure exclusive_scan(Measure x, Measure& total, Measure* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Measure within = inclusive_scan_warp(x);
  if (lane == 31) scratch[warp] = within;
  __syncthreads();
  const Measure warps = inclusive_scan_warp(lane < kWarps ? scratch[lane] : Measure{0, 0});
  const u32 rows = __shfl_sync(kAllLanes, warps.rows, warp ? warp - 1 : 0), mass = __shfl_sync(kAllLanes, warps.mass, warp ? warp - 1 : 0);
  total = {__shfl_sync(kAllLanes, warps.rows, 31), __shfl_sync(kAllLanes, warps.mass, 31)};
  __syncthreads();
  const u32 before_rows = warp ? rows : 0, before_mass = warp ? mass : 0;
  return {before_rows + within.rows - x.rows, before_mass + within.mass - x.mass};
}

// Consecutive numbers: first, first + 1, ...
struct Stretch {
  int first, n;
};

// Writes the stretches of items 0, 1, ... one behind the other to out (most), then -1 up to its end; returns how many numbers
// precede those. stretch(item, segment, list) with item = segment * lists + list. A warp has a range of items to itself.
template <class F>
__device__ __forceinline__ int write_stretches(int items, int lists, int* out, int most, Measure* scratch, F stretch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks = (items + 31) / 32, share = (blocks + kWarps - 1) / kWarps;
  const int from = warp * share * 32, to = from + share * 32 < items ? from + share * 32 : items;
  u32 at = 0, count = 0;
#pragma unroll 1
  for (int writing = 0; writing < 2; writing++) {  // first it counts
    int segment = (from + lane) / lists, list = from + lane - segment * lists;
#pragma unroll 1
    for (int base = from; base < to; base += 32) {
      const Stretch x = base + lane < items ? stretch(base + lane, segment, list) : Stretch{0, 0};
      list += 32;
      while (list >= lists) list -= lists, segment++;
      u32 end = x.n;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const u32 below = __shfl_up_sync(kAllLanes, end, step);
        if (lane >= step) end += below;
      }
      const u32 all = __shfl_sync(kAllLanes, end, 31);
#pragma unroll 1
      for (u32 start = 0; start < all && writing; start += 32) {
        const u32 place = start + lane;
        int owner = 0;  // lanes whose stretch ends at or before the place
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
          if (__shfl_sync(kAllLanes, end, owner + step - 1) <= place) owner += step;
        const int first = __shfl_sync(kAllLanes, x.first, owner), n = __shfl_sync(kAllLanes, x.n, owner);
        const int within = static_cast<int>(place - (__shfl_sync(kAllLanes, end, owner) - n));
        if (place < all && at + place < static_cast<u32>(most)) out[at + place] = first + within;
      }
      at += all;
    }
    if (writing) break;
    Measure total;
    at = __shfl_sync(kAllLanes, exclusive_scan({lane == 0 ? at : 0, 0}, total, scratch).rows, 0);
    count = total.rows < static_cast<u32>(most) ? total.rows : most;
  }
  for (int i = count + threadIdx.x; i < most; i += kThreads) out[i] = -1;
  return static_cast<int>(count);
}

}  // namespace
