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

__device__ __forceinline__ Measure operator-(Measure x, Measure y) { return {x.rows - y.rows, x.mass - y.mass}; }
__device__ __forceinline__ Measure operator+(Measure x, Measure y) { return {x.rows + y.rows, x.mass + y.mass}; }

__device__ __forceinline__ u32 inclusive_scan_warp(u32 x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u32 below = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

__device__ __forceinline__ Measure inclusive_scan_warp(Measure x) {
  return {inclusive_scan_warp(x.rows), inclusive_scan_warp(x.mass)};
}

// The first lane whose `end`, ascending over the lanes, lies beyond `place`; 31 if none does.
__device__ __forceinline__ int owner_of(u32 end, u32 place) {
  int owner = 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    if (__shfl_sync(kAllLanes, end, owner + step - 1) <= place) owner += step;
  return owner;
}

// Shared memory of what this file does.
struct Scratch {
  Measure scan[32];
  u32 found[32];
};

__device__ __forceinline__ u32 from_lane(u32 x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ __forceinline__ Measure from_lane(Measure x, int lane) { return {from_lane(x.rows, lane), from_lane(x.mass, lane)}; }

// The sum of x (u32 or Measure) over the threads before this one; total: over all. scratch (kWarps) is free again afterwards.
template <class T>
__device__ __forceinline__ T exclusive_scan(T x, T& total, T* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T within = inclusive_scan_warp(x);
  if (lane == 31) scratch[warp] = within;
  __syncthreads();
  const T warps = inclusive_scan_warp(lane < kWarps ? scratch[lane] : T{});
  total = from_lane(warps, 31);
  const T before = from_lane(warps, warp ? warp - 1 : 0);
  __syncthreads();
  return (warp ? before : T{}) + (within - x);
}

// Consecutive numbers: first, first + 1, ...
struct Stretch {
  int first, n;
};

constexpr int kWindow = 256;  // items that a warp looks through at a time

// Shared memory of write_stretches.
struct Writing {
  u32 scan[kWarps], found[kWarps];
  int first[kThreads];  // of the stretches at hand, and the place in out behind each
  u32 end[kThreads];
  u16 items[kWarps * kWindow];  // those of a warp that may have something, from the start of all warps' windows
};

// Writes the stretches of items 0, 1, ... one behind the other to out (most); returns how many numbers they have. may(item): false if it has none; stretch(item) is asked of the others. Few do, so those are gathered first.
template <class May, class F>
__device__ __forceinline__ int write_stretches(int items, int* out, int most, Writing& writing, May may, F stretch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 at = 0;
#pragma unroll 1
  for (int window = 0; window < items && at < static_cast<u32>(most); window += kWarps * kWindow) {
    u32 found = 0;
#pragma unroll 2
    for (int k = lane; k < kWindow; k += 32) {
      const int item = window + warp * kWindow + k;
      const bool in = item < items && may(item);
      const u32 lanes = __ballot_sync(kAllLanes, in);
      if (in) writing.items[warp * kWindow + found + __popc(lanes & ((1u << lane) - 1))] = static_cast<u16>(warp * kWindow + k);
      found += __popc(lanes);
    }
    if (lane == 0) writing.found[warp] = found;
    __syncthreads();
    const u32 mine = lane < kWarps ? writing.found[lane] : 0, ends = inclusive_scan_warp(mine), all = from_lane(ends, 31);
#pragma unroll 1
    for (u32 base = 0; base < all; base += kThreads) {
      const u32 index = base + threadIdx.x;
      const int owner = owner_of(ends, index);  // whose window the thread's item lies in
      const u32 before_owner = from_lane(ends - mine, owner);
      Stretch x{0, 0};
      if (index < all) x = stretch(window + writing.items[owner * kWindow + index - before_owner]);
      x.n = x.n < most ? x.n : most;  // whatever tables hold, this ends
      u32 total;
      const u32 start = at + exclusive_scan(static_cast<u32>(x.n), total, writing.scan);
      writing.first[threadIdx.x] = x.first, writing.end[threadIdx.x] = start + x.n;
      __syncthreads();
      // A warp has a stretch at a time, so that long ones, which lie together, are spread over the block like short ones.
      const u32 stretches = all - base < kThreads ? all - base : kThreads;
#pragma unroll 2
      for (u32 i = warp; i < stretches; i += kWarps) {
        const u32 begin = i ? writing.end[i - 1] : at, end = min(writing.end[i], static_cast<u32>(most));
        const int shift = writing.first[i] - static_cast<int>(begin);
#pragma unroll 1
        for (u32 place = begin + lane; place < end; place += 32) out[place] = static_cast<int>(place) + shift;
      }
      __syncthreads();
      at += total;
    }
    __syncthreads();  // before the windows move on
  }
  return at < static_cast<u32>(most) ? static_cast<int>(at) : most;
}

}  // namespace
