// The weights of runs, from the router's scores: see Backend.probe in backends/base.py.
//
// exp(z + a) is formed as exp(z) exp(a), each relative to its largest: j * (l + S) exponentials instead of j * l * S. Scores
// too far apart for that (the best list lies in segments of no weight) are weighed again, one exponential a run.
#pragma once
#include "select_params.cuh"

namespace {

// One selection: where it reads, where its shared memory is.
struct Selection {
  const float* z;  // (j, l)
  const float* a;  // (j, stride), or null
  Runs runs;
  Fixed* fixed;
  float* bend;     // (S, kColumns) exp of the distance term of the vectors at hand, relative to its largest; wide: itself
  float* place;    // (S) of a segment on the knots
  float* share;    // (j) what each vector counts, relative to the most
  u32* keys;       // (items) bits of the weights
  int j, segments, knots, stride;  // knots: 0 if there is no distance term
  bool size_weighted, by_mass;       // without size_weighted: knots = 0, a = null

  __device__ __forceinline__ float c(int i) const { return a ? a[(i + 1) * stride - 1] : INFINITY; }

  // What each vector counts: the sigmoid of c, relative to the largest. One warp.
  __device__ __forceinline__ void find_shares() const {
    const int lane = threadIdx.x % 32;
    float best = -INFINITY;
#pragma unroll 1
    for (int i = lane; i < j; i += 32) best = fmaxf(best, c(i));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, step));
    // sigmoid(c) = exp(min(c, 0)) / (1 + exp(-|c|)): the ratio of two of them is safe however small both are
    const float base = fminf(best, 0.f), one = 1.f + weigh(-fabsf(best));
#pragma unroll 1
    for (int i = lane; i < j; i += 32) {
      const float x = c(i), relative = weigh(fminf(x, 0.f) - base) * (one / (1.f + weigh(-fabsf(x))));
      share[i] = x == x && relative > 0.f ? relative : 0.f;
    }
    if (lane == 0) fixed->most_share = weigh(base) / one;
  }

  // Where each segment lies on the knots, as QueryRouter.knots has it.
  __device__ __forceinline__ void find_places(const float* centres, int next_position, int first_knot) const {
    for (int s = threadIdx.x; s < segments; s += kThreads) {
      const float distance = static_cast<float>(static_cast<double>(next_position) - 1.0 - static_cast<double>(centres[s]));
      const u32 bits = __float_as_uint(distance > 1.f ? distance : 1.f);
      // The exponent apart, so that powers of two are whole and what is rounded is the fraction.
      const float octaves = static_cast<float>(static_cast<int>(bits >> 23) - 127 - first_knot);
      const float at = octaves + log2f(__uint_as_float((bits & 0x007fffff) | 0x3f800000));
      place[s] = fminf(fmaxf(at, 0.f), static_cast<float>(knots > 0 ? knots - 1 : 0));
    }
  }

  // Fills bend for vectors j0, j0 + 1, ...; a warp takes one.
  __device__ __forceinline__ void find_bends(int j0, bool wide) const {
    const int lane = threadIdx.x % 32;
    for (int column = threadIdx.x / 32; column < kColumns; column += kWarps) {
      const bool present = j0 + column < j;
      const float knot = present && lane < knots ? a[(j0 + column) * stride + lane] : 0.f;
      float top = -INFINITY;
      bool odd = false;
      for (int base = 0; base < segments; base += 32) {
        const int s = base + lane;
        const float at = s < segments ? place[s] : 0.f;
        const int low = static_cast<int>(at);
        const float from = __shfl_sync(kAllLanes, knot, low);
        const float to = __shfl_sync(kAllLanes, knot, low + 1 < knots ? low + 1 : low);
        const float x = from + (at - static_cast<float>(low)) * (to - from);
        if (s >= segments) continue;
        bend[s * kColumns + column] = x;
        odd |= !(x < INFINITY);
        top = fmaxf(top, x);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
      odd = __any_sync(kAllLanes, odd);
      if (!wide)
        for (int s = lane; s < segments; s += 32) {
          float& x = bend[s * kColumns + column];
          x = x < INFINITY && top > -INFINITY ? weigh(x - top) : 0.f;
        }
      if (lane == 0) fixed->odd[column] = odd;
    }
  }

  // The sums Z of vectors j0, j0 + 1, ...: fixed->top and fixed->factor. Lists that hold no token have no say in top.
  __device__ __forceinline__ void find_sums(int j0, bool wide) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Mass mass[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; k++) mass[k] = {-INFINITY, 0.f};
    const Split split(runs.lists);
#pragma unroll 1
    for (int list = split.list; list < runs.lists; list += split.step) {
      float density[kLists][kColumns];
      int tokens[kLists];  // only whether there are any
#pragma unroll
      for (int i = 0; i < kLists; i++) {
        tokens[i] = !size_weighted && split.group == 0 && list + 32 * i < runs.lists;
#pragma unroll
        for (int k = 0; k < kColumns; k++) density[i][k] = static_cast<float>(tokens[i]);
      }
      const int* start = runs.start(split.group, list);
#pragma unroll kUnroll
      for (int s = split.group; s < segments && size_weighted && !wide; s += split.groups) {
        const Bends x = bends(s);
#pragma unroll
        for (int i = 0; i < kLists; i++) {
          const int n = list + 32 * i < runs.lists ? Runs::length(start + 32 * i) : 0;
          tokens[i] |= n;
#pragma unroll
          for (int k = 0; k < kColumns; k++) density[i][k] += static_cast<float>(n) * x.of[k];
        }
        start += split.groups * (runs.lists + 1);
      }
      if (wide) add_runs(j0, list, split, mass);
#pragma unroll
      for (int k = 0; k < kColumns; k++) {
        float score[kLists], most = mass[k].top;
        scores(j0 + k, list, score);
#pragma unroll
        for (int i = 0; i < kLists; i++)
          if (tokens[i]) most = fmaxf(most, score[i]);
        mass[k].raise(most);
#pragma unroll
        for (int i = 0; i < kLists; i++) {
          if (tokens[i]) mass[k].add(score[i], density[i][k]);
          if (!(score[i] < INFINITY)) mass[k].sum = NAN;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kColumns; k++) {
      mass[k].reduce();
      if (lane == 0) fixed->partial[warp * kColumns + k] = mass[k];
    }
    __syncthreads();
#pragma unroll 1
    for (int column = warp; column < kColumns; column += kWarps) {
      Mass all = lane < kWarps ? fixed->partial[lane * kColumns + column] : Mass{-INFINITY, 0.f};
      all.reduce();
      if (lane != 0) continue;
      const float mine = j0 + column < j && !fixed->odd[column] ? share[j0 + column] : 0.f;
      if (!wide && knots > 0 && mine > 0.f && all.sum < kLeastSum) fixed->far = 1;
      fixed->top[column] = all.top;
      fixed->factor[column] = all.sum > 0.f ? mine / all.sum : 0.f;
    }
    __syncthreads();
  }

  // What find_sums adds where `wide`: every run by itself.
  __device__ __forceinline__ void add_runs(int j0, int list, const Split& split, Mass (&mass)[kColumns]) const {
#pragma unroll 1
    for (int i = 0; i < kLists; i++)
#pragma unroll 1
      for (int s = split.group; s < segments; s += split.groups) {
        const int at = list + 32 * i, n = at < runs.lists ? runs.length(s, at) : 0;
        if (n == 0) continue;
#pragma unroll
        for (int k = 0; k < kColumns; k++) {
          const float score = this->score(j0 + k, at) + bend[s * kColumns + k];
          mass[k].raise(fmaxf(mass[k].top, score));
          mass[k].add(score, static_cast<float>(n));
        }
      }
  }

  // Of a vector and a list; without either -infinity.
  __device__ __forceinline__ float score(int vector, int list) const {
    return vector < j && list < runs.lists ? z[vector * runs.lists + list] : -INFINITY;
  }
  // Of the lists of a thread.
  __device__ __forceinline__ void scores(int vector, int list, float (&score)[kLists]) const {
    const float* from = z + (vector * runs.lists + list);
#pragma unroll
    for (int i = 0; i < kLists; i++) score[i] = vector < j && list + 32 * i < runs.lists ? from[32 * i] : -INFINITY;
  }

  struct Bends {
    float of[kColumns];
  };
  __device__ __forceinline__ Bends bends(int s) const {
    Bends x;
    const float4* from = reinterpret_cast<const float4*>(bend + s * kColumns);
#pragma unroll
    for (int k = 0; k < kColumns / 4; k++) {
      const float4 four = from[k];
      x.of[4 * k] = four.x, x.of[4 * k + 1] = four.y, x.of[4 * k + 2] = four.z, x.of[4 * k + 3] = four.w;
    }
    return x;
  }

  // A weight that is a number; NaN weighs nothing.
  __device__ __forceinline__ static float as_key(float w) { return fminf(fmaxf(w, 0.f), kMost); }

  __device__ __forceinline__ void tally(float key, Measure x) const {
    fixed->search.tally(__float_as_uint(key) >> kFirstShift, x);
  }

  // A run of n tokens of weight w; units: of mass, of a weight of one.
  __device__ __forceinline__ Measure measure(int n, float w, float units) const {
    const float mass = static_cast<float>(n) * w;
    if (!by_mass || !(mass > 0.f)) return {static_cast<u32>(n), 0};
    return {static_cast<u32>(n), static_cast<u32>(fminf(fmaxf(mass * units + 0.5f, 1.f), kMassUnits))};
  }

  // Adds the weights of vectors j0, j0 + 1, ... to those of all runs. last: tallies them.
  __device__ __forceinline__ void store_runs(int j0, bool last, float units) const {
    const Split split(runs.lists);
#pragma unroll 1
    for (int list = split.list; list < runs.lists; list += split.step) {
      float relative[kLists][kColumns];
      relative_weights(j0, list, relative);
      const int* start = runs.start(split.group, list);
      u32* to = keys + (split.group * runs.lists + list);
#pragma unroll kUnroll
      for (int s = split.group; s < segments; s += split.groups) {
        const Bends x = bends(s);
#pragma unroll
        for (int i = 0; i < kLists; i++) {
          const bool in = list + 32 * i < runs.lists;
          const int n = in ? Runs::length(start + 32 * i) : 0;
          float w = j0 > 0 && in ? __uint_as_float(to[32 * i]) : 0.f;
#pragma unroll
          for (int k = 0; k < kColumns; k++) w += relative[i][k] * x.of[k];
          w = n > 0 ? as_key(w) : 0.f;
          if (in) to[32 * i] = __float_as_uint(w);
          if (last) tally(w, measure(n, w, units));
        }
        start += split.groups * (runs.lists + 1), to += split.groups * runs.lists;
      }
    }
  }

  // Weights of the lists of a thread to vectors j0, j0 + 1, ..., but for the distance term. Infinite at most without tokens.
  __device__ __forceinline__ void relative_weights(int j0, int list, float (&w)[kLists][kColumns]) const {
#pragma unroll
    for (int k = 0; k < kColumns; k++) {
      const float factor = fixed->factor[k], top = fixed->top[k];
      float score[kLists];
      scores(j0 + k, list, score);
#pragma unroll
      for (int i = 0; i < kLists; i++) w[i][k] = factor > 0.f ? factor * weigh(score[i] - top) : 0.f;
    }
  }

  // store_runs where `wide`.
  __device__ __forceinline__ void store_runs_wide(int j0, bool last, float units) const {
#pragma unroll 1
    for (int list = threadIdx.x; list < runs.lists; list += kThreads)
#pragma unroll 1
      for (int s = 0; s < segments; s++) {
        const int n = runs.length(s, list);
        u32& key = keys[s * runs.lists + list];
        const float w = n > 0 ? as_key((j0 > 0 ? __uint_as_float(key) : 0.f) + weight(j0, s, list)) : 0.f;
        key = __float_as_uint(w);
        if (last) tally(w, measure(n, w, units));
      }
  }

  // The same for one run, relative to the largest score of any run.
  __device__ __forceinline__ float weight(int j0, int s, int list) const {
    float w = 0.f;
#pragma unroll 1
    for (int k = 0; k < kColumns; k++)
      if (fixed->factor[k] > 0.f)
        w += fixed->factor[k] * weigh(score(j0 + k, list) + bend[s * kColumns + k] - fixed->top[k]);
    return w;
  }

  // The same for lists without distance, each counting as one and with all its rows.
  __device__ __forceinline__ void store_lists(int j0, bool last) const {
#pragma unroll 1
    for (int list = threadIdx.x; list < runs.lists; list += kThreads) {
      float w = j0 > 0 ? __uint_as_float(keys[list]) : 0.f;
#pragma unroll 1
      for (int k = 0; k < kColumns; k++)
        if (fixed->factor[k] > 0.f) w += fixed->factor[k] * weigh(score(j0 + k, list) - fixed->top[k]);
      w = as_key(w);
      keys[list] = __float_as_uint(w);
      if (last) tally(w, {rows_of_list(list), 1});
    }
  }
  __device__ __forceinline__ u32 rows_of_list(int list) const {
    u32 rows = 0;
#pragma unroll kUnroll
    for (int s = 0; s < segments; s++) rows += runs.length(s, list);
    return rows;
  }

  // Keys of all runs (or lists, if SAAP_LISTS), tallied in the search, which is clear. Returns the sum of the shares; units: by
  // what the mass of a run is multiplied to be counted.
  __device__ __forceinline__ float weigh_all(float& units) const {
    float total = 0.f;
#pragma unroll 1
    for (int j0 = 0; j0 < j; j0 += kColumns) {
      const bool last = j0 + kColumns >= j;
      bool wide = false;
      if (threadIdx.x == 0) fixed->far = 0;
#pragma unroll 1
      for (;;) {
        find_bends(j0, wide);
        __syncthreads();
        find_sums(j0, wide);
        if (wide || !fixed->far) break;
        wide = true;
        __syncthreads();
      }
      for (int k = 0; k < kColumns; k++) total += fixed->factor[k] > 0.f ? share[j0 + k] : 0.f;
      units = by_mass && total > 0.f ? kMassUnits / total : 0.f;
      if (SAAP_LISTS) store_lists(j0, last);
      else if (wide) store_runs_wide(j0, last, units);
      else store_runs(j0, last, units);
      __syncthreads();
    }
    return total;
  }
};

}  // namespace
