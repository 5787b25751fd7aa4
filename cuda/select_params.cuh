// What a selection is given, and the small things that its parts share.
#pragma once
#include "select_cut.cuh"

#ifndef SAAP_COLUMNS
#define SAAP_COLUMNS 4  // query vectors that are weighed together, a multiple of 4
#endif
#ifndef SAAP_LISTS
#define SAAP_LISTS 0  // 1: nprobe, whole lists are selected
#endif
#ifndef SAAP_FAR
#define SAAP_FAR 0  // 1: what grows with S does not fit in shared memory and lies in the workspace
#endif
#ifndef SAAP_TAKEN
#define SAAP_TAKEN 0  // 1: not the rows are written, but how many of each run; without nprobe and tail
#endif

struct SelectParams {
  const float* z;         // (b, h, j, l)
  const float* a;         // (b, h, j, m + 1): the distance term at m knots, and c; null without c
  const int* tables;      // (b, h, S, l + 1)
  const float* centres;   // (b, S)
  const int* meta;        // (b, 8)
  const int* budgets;     // (b, h) most rows
  const int* entries;     // (b, h) most tail entries, or null: no tail
  const float* unread_mass;      // (h) attention per query vector that may stay unread, or null
  int* rows;              // out (b, h, t_cap); with SAAP_TAKEN (b, h, S, l), of the segments that are there
  int* counts;            // out (b, h); null with SAAP_TAKEN
  int* tail;              // out (b, h, x_cap), null without entries
  int* tail_counts;       // out (b, h), likewise
  float* workspace;       // (b, h, room(S, l)) if SAAP_FAR, else null
  int h, j, l, segments;  // segments: S
  int knots, first_knot;  // m; 0 without c
  int t_cap, x_cap, nprobe, size_weighted;
};

namespace {

constexpr int kColumns = SAAP_COLUMNS, kLists = kColumns > 4 ? 2 : 4, kUnroll = 2;
constexpr float kLog2E = 1.44269504f;
constexpr float kMost = 3e38f;              // the largest weight
constexpr float kLeastSum = 1e-15f;         // one this large leaves room for runs 20 orders of magnitude below
constexpr float kMassUnits = 2147483648.f;  // mass is counted in these parts of the whole

__device__ __forceinline__ int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
__device__ __forceinline__ float weigh(float relative) { return exp2_fast(kLog2E * relative); }

// A sum of exponentials: sum * exp(top). A score of NaN or infinity makes the sum NaN.
struct Mass {
  float top, sum;

  // Relative to a larger top.
  __device__ __forceinline__ void raise(float most) {
    sum *= weigh(top - (most > -INFINITY ? most : 0.f));
    top = most;
  }
  // A score that is at most top.
  __device__ __forceinline__ void add(float score, float weight) {
    sum += weight * weigh(score - (top > -INFINITY ? top : 0.f));
  }

  // Over the lanes of a warp; all of them have the same top, lane 0 has the sum.
  __device__ __forceinline__ void reduce() {
    float most = top;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    raise(most);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  }
};

// The runs of one (sequence, KV head).
struct Runs {
  const int* tables;  // (S, l + 1)
  int lists;

  __device__ __forceinline__ int end(int segment, int list) const { return tables[segment * (lists + 1) + list + 1]; }
  __device__ __forceinline__ const int* start(int segment, int list) const { return tables + (segment * (lists + 1) + list); }
  __device__ __forceinline__ static int length(const int* start) {
    const int n = static_cast<int>(static_cast<u32>(start[1]) - static_cast<u32>(start[0]));
    return n > 0 ? n : 0;
  }
  __device__ __forceinline__ int length(int segment, int list) const { return length(start(segment, list)); }
};

// Shared memory whose size is known to the compiler; share and, unless SAAP_FAR, bend, place and keys follow.
struct Fixed {
  Search search;
  Mass partial[kWarps * kColumns];
  float top[kColumns];     // of the vectors at hand: scores are relative to this
  float factor[kColumns];  // share / sum; 0 where there is nothing to count
  int odd[kColumns];       // whether the distance term is no number somewhere
  float most_share;        // the largest share, not relative to itself
  int far;                 // whether the vectors at hand need `wide`
};

// Floats of bend, place and keys.
__device__ __forceinline__ i64 room(int segments, int lists) {
  return (static_cast<i64>(segments) * (kColumns + 1) + (SAAP_LISTS ? 1 : segments) * static_cast<i64>(lists) + 3) / 4 * 4;
}

// How threads share lists and segments: a thread has kLists lists, 32 apart, at a time, so that a warp reads neighbours and the
// distance terms are read once for all of them; few lists leave warps for several segments.
struct Split {
  int list, step, group, groups;

  __device__ __forceinline__ explicit Split(int lists) {
    const int warp = threadIdx.x / 32, wanted = (lists + 32 * kLists - 1) / (32 * kLists);
    const int columns = wanted < kWarps ? wanted : kWarps;
    groups = kWarps / columns, group = warp / columns, step = columns * 32 * kLists;
    list = group < groups ? (warp - group * columns) * 32 * kLists + static_cast<int>(threadIdx.x) % 32 : lists;
  }
};

}  // namespace
