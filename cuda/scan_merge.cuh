// From the states that the warps of a block hold to the result of a pair. A pair that several blocks share has their states
// written to device memory; the block that arrives last adds them up, in the order of the blocks. Blocks of a pair are
// neighbours, and so are the slots blockIdx.x + pair of their states: from one (block, pair) to the next in the row of tiles at
// least one of the two grows, so no slot is used twice.
#pragma once
#include "scan_walk.cuh"

// What the warps of a block exchange, in shared memory.
struct Exchange {
  int* flag;
  float2* masses;  // (kWarps, 8)
  float* values;   // (kWarps, 8, kStride), or
  float* weights;  // (parts of the pair, kVectors)
  SAAP_PRIM explicit Exchange(char* shared)
      : flag(reinterpret_cast<int*>(shared + kStagesBytes)),
        masses(reinterpret_cast<float2*>(shared + kStagesBytes + 16)),
        values(reinterpret_cast<float*>(shared + kStagesBytes + kCoreOffset + kCoreBytes)),
        weights(values) {}
};

SAAP_PRIM saap::softmax_mass mass_of(float2 x) { return {x.x, x.y}; }

// What the value sum of a part is multiplied by in a union whose weights refer to `top`, at least the part's own reference.
SAAP_PRIM float share(saap::softmax_mass part, float top) { return part.is_empty() ? 0.f : exp2_fast(part.m - top); }

SAAP_PRIM void store_pair(void* base, i64 index, float x, float y) {
  if constexpr (kQuery == kF32) {
    *reinterpret_cast<float2*>(static_cast<float*>(base) + index) = make_float2(x, y);
  } else {
    *reinterpret_cast<u32*>(static_cast<u16*>(base) + index) = narrow2<kQuery>(x, y);
  }
}

// The result of a pair with nothing to read. Every block takes its share of those pairs.
SAAP_PRIM void finish_empty_pairs(const ScanParams& p, int pass) {
  for (int pair = blockIdx.x; pair < p.sequences * p.heads; pair += gridDim.x) {
    if (span_of(p, pair).tiles() > 0) continue;
    const int first = pass * kVectors, count = p.vectors - first < kVectors ? p.vectors - first : kVectors;
    const i64 row = static_cast<i64>(pair) * p.vectors + first;
    for (int i = threadIdx.x; i < count * kE / 2; i += kThreads) store_pair(p.out, row * kE + 2 * i, 0.f, 0.f);
    for (int i = threadIdx.x; i < count; i += kThreads) p.lse[row + i] = -INFINITY;
  }
}

// The last block of a pair: the states in slots [slot, slot + parts), in that order, become out and lse.
SAAP_PRIM void merge_parts(const ScanParams& p, const Exchange& area, int pair, int pass, i64 slot, int parts) {
  const int lane = threadIdx.x % 32, first = pass * kVectors;
  float* const weights = area.weights;
  for (int v = threadIdx.x / 32; v < kVectors && first + v < p.vectors; v += kWarps) {
    saap::softmax_mass mine = saap::softmax_mass::empty();
    for (int k = lane; k < parts; k += 32) {
      const saap::softmax_mass part = mass_of(ld_l2_8(p.masses + ((slot + k) * kVectors + v) * 2));
      float keep, take;
      mine.join(part, keep, take);
      weights[k * kVectors + v] = part.is_empty() ? -INFINITY : part.m;
    }
    const float top = warp_max(mine.m);
    const saap::softmax_mass whole{top, warp_sum(mine.l * share(mine, top))};
    const float inverse = whole.inverse();
    for (int k = lane; k < parts; k += 32) {
      const float m = weights[k * kVectors + v];
      weights[k * kVectors + v] = m == -INFINITY ? 0.f : exp2_fast(m - top) * inverse;
    }
    if (lane == 0) p.lse[static_cast<i64>(pair) * p.vectors + first + v] = whole.lse();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kVectors * kE / 2; i += kThreads) {
    const int v = i / (kE / 2), x = i % (kE / 2) * 2;
    if (first + v >= p.vectors) break;
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll 8
    for (int k = 0; k < parts; k++) {
      const float2 part = ld_l2_8(p.partials + ((slot + k) * kVectors + v) * kE + x);
      const float weight = weights[k * kVectors + v];
      sum.x += weight * part.x, sum.y += weight * part.y;
    }
    store_pair(p.out, (static_cast<i64>(pair) * p.vectors + first + v) * kE + x, sum.x, sum.y);
  }
  __syncthreads();  // the area is free again
}

// Called by all warps of the block when their tiles of the pair `at` are done.
template <class Core>
SAAP_PRIM void finish_pair(const ScanParams& p, Core& core, const Exchange& area, const Place& at, const Split& split,
                           int pass) {
  const int first_block = split.block_of(at.begin), parts = split.block_of(at.end - 1) - first_block + 1;
  const i64 slots = static_cast<i64>(pass) * (gridDim.x + p.sequences * p.heads), slot = slots + blockIdx.x + at.pair;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    core.deposit(g, area.values + warp * 8 * kStride, area.masses + warp * 8);
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * kE / 2; i += kThreads) {
      const int v = i / (kE / 2), x = i % (kE / 2) * 2, vector = pass * kVectors + g * 8 + v;
      if (vector >= p.vectors) break;
      saap::softmax_mass whole = saap::softmax_mass::empty();
#pragma unroll
      for (int w = 0; w < kWarps; w++)
        if (!mass_of(area.masses[w * 8 + v]).is_empty()) whole.m = fmaxf(whole.m, area.masses[w * 8 + v].x);
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        const saap::softmax_mass part = mass_of(area.masses[w * 8 + v]);
        const float2 value = *reinterpret_cast<const float2*>(area.values + (w * 8 + v) * kStride + x);
        const float factor = share(part, whole.m);
        whole.l += factor * part.l, sum.x += factor * value.x, sum.y += factor * value.y;
      }
      const i64 row = static_cast<i64>(at.pair) * p.vectors + vector, scratch = slot * kVectors + g * 8 + v;
      if (parts == 1) {
        const float inverse = whole.inverse();
        store_pair(p.out, row * kE + x, sum.x * inverse, sum.y * inverse);
        if (x == 0) p.lse[row] = whole.lse();
      } else {
        *reinterpret_cast<float2*>(p.partials + scratch * kE + x) = sum;
        if (x == 0) *reinterpret_cast<float2*>(p.masses + scratch * 2) = make_float2(whole.m, whole.l);
      }
    }
    __syncthreads();
  }
  if (parts == 1) return;
  if (threadIdx.x == 0) {
    int* ticket = p.tickets + static_cast<i64>(pass) * p.sequences * p.heads + at.pair;
    __threadfence();  // what the barrier gave this thread to see, whoever sees its ticket sees too
    const bool last = atomicAdd(ticket, 1) == parts - 1;
    __threadfence();
    if (last) atomicAdd(ticket, -parts);  // for the next launch
    *area.flag = last;
  }
  __syncthreads();
  if (*area.flag) merge_parts(p, area, at.pair, pass, slots + first_block + at.pair, parts);
}
