// From the states that the warps of a block hold to the result of a pair. A pair that several blocks share has their states
// written to device memory; the block that arrives last adds them up, in the order of the blocks. Blocks of a pair are
// neighbours, and so are the slots blockIdx.x + pair of their states: from one (block, pair) to the next in the row of tiles at
// least one of the two grows, so no slot is used twice.
#pragma once
#include "scan_walk.cuh"

// What the warps of a block exchange, in shared memory.
struct Exchange {
  Work* work;
  float2* masses;  // (kWarps, 8)
  float* values;   // (kWarps, 8, kStride)
  SAAP_PRIM explicit Exchange(char* shared)
      : work(reinterpret_cast<Work*>(shared + kStagesBytes)),
        masses(reinterpret_cast<float2*>(shared + kStagesBytes + kWorkBytes)),
        values(reinterpret_cast<float*>(shared + kStagesBytes + kCoreOffset + kCoreBytes)) {}
};

// The blocks that share a pair: `count` of them from `first` on.
struct Parts {
  int first, count;
};

SAAP_PRIM Parts parts_of(const Work& work, const Place& at) {
  if (at.begin >= work.begin && at.end <= work.last) return {static_cast<int>(blockIdx.x), 1};
  const int first = work.split.block_of(at.begin);
  return {first, work.split.block_of(at.end - 1) - first + 1};
}

SAAP_PRIM saap::softmax_mass mass_of(float2 x) { return {x.x, x.y}; }

// What the value sum of a part is multiplied by in a union whose weights refer to `top`, at least the part's own reference.
SAAP_PRIM float share(saap::softmax_mass part, float top) { return part.is_empty() ? 0.f : exp2_fast(part.m - top); }

SAAP_PRIM float highest(float top, saap::softmax_mass part) { return part.is_empty() ? top : fmaxf(top, part.m); }

SAAP_PRIM void store_pair(void* base, i64 index, float x, float y) {
  if constexpr (kQuery == kF32 || SAAP_CODED) {
    *reinterpret_cast<float2*>(static_cast<float*>(base) + index) = make_float2(x, y);
  } else {
    *reinterpret_cast<u32*>(static_cast<u16*>(base) + index) = narrow2<kQuery>(x, y);
  }
}

// The results of the pairs with nothing to read of those that the block looks after.
SAAP_PRIM void finish_empty_pairs(const ScanParams& p, int pass) {
  const int pairs = p.sequences * p.heads, share = empty_share(p);
  for (int pair = blockIdx.x * share; pair < pairs && pair < (blockIdx.x + 1) * share; pair++) {
    if (span_of(p, pair).tiles() > 0) continue;
    const int first = pass * kVectors, count = p.vectors - first < kVectors ? p.vectors - first : kVectors;
    const i64 row = static_cast<i64>(pair) * p.vectors + first;
    for (int i = threadIdx.x; i < count * kE / 2; i += kThreads) store_pair(p.out, row * kE + 2 * i, 0.f, 0.f);
    for (int i = threadIdx.x; i < count; i += kThreads) p.lse[row + i] = -INFINITY;
  }
}

// The last block of a pair: the states in slots [slot, slot + parts) become out and lse. A thread has four dims of a vector, and
// every other part; its neighbour has the rest.
SAAP_PRIM void merge_parts(const ScanParams& p, int pair, int pass, i64 slot, int parts) {
  constexpr int kAtOnce = kGroups > 1 ? 4 : 9, kColumns = kE / 4;  // more do not fit beside the state of two groups
  const int first = pass * kVectors, lane = threadIdx.x % 32, half = lane % 2;
  const int vectors = p.vectors - first < kVectors ? p.vectors - first : kVectors;
#pragma unroll 1
  for (int i = threadIdx.x; i - lane < vectors * kColumns * 2; i += kThreads) {
    const int v = i / 2 / kColumns, x = i / 2 % kColumns * 4;
    saap::softmax_mass whole = saap::softmax_mass::empty();
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int k = half; k < parts && v < vectors; k += 2 * kAtOnce) {
      // All loads at once: they take as long as one.
      float2 masses[kAtOnce];
      float4 values[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; u++) {
        const i64 at = (slot + k + 2 * u) * kVectors + v;
        masses[u] = make_float2(-INFINITY, 0.f), values[u] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (k + 2 * u < parts) masses[u] = ld_l2_8(p.masses + at * 2), values[u] = ld_l2_16(p.partials + at * kE + x);
      }
      float top = highest(-INFINITY, whole);
#pragma unroll
      for (int u = 0; u < kAtOnce; u++) top = highest(top, mass_of(masses[u]));
      const float keep = share(whole, top);
      whole.l *= keep, whole.m = top;
      sum.x *= keep, sum.y *= keep, sum.z *= keep, sum.w *= keep;
#pragma unroll
      for (int u = 0; u < kAtOnce; u++) {
        const float factor = share(mass_of(masses[u]), top);
        whole.l += factor * masses[u].y;
        sum.x += factor * values[u].x, sum.y += factor * values[u].y;
        sum.z += factor * values[u].z, sum.w += factor * values[u].w;
      }
    }
    const saap::softmax_mass other{__shfl_xor_sync(kAll, whole.m, 1), __shfl_xor_sync(kAll, whole.l, 1)};
    const float top = highest(highest(-INFINITY, whole), other), mine = share(whole, top), others = share(other, top);
    whole.l = mine * whole.l + others * other.l, whole.m = top;
    // Each of the two finishes half of the dims.
    const float give_x = half ? sum.x : sum.z, give_y = half ? sum.y : sum.w;
    const float x0 = mine * (half ? sum.z : sum.x) + others * __shfl_xor_sync(kAll, give_x, 1);
    const float x1 = mine * (half ? sum.w : sum.y) + others * __shfl_xor_sync(kAll, give_y, 1);
    if (v >= vectors) continue;
    const float inverse = whole.inverse();
    const i64 row = static_cast<i64>(pair) * p.vectors + first + v;
    store_pair(p.out, row * kE + x + 2 * half, x0 * inverse, x1 * inverse);
    if (x == 0 && half == 0) p.lse[row] = whole.lse();
  }
}

// Called by all warps of the block when their tiles of the pair `at` are done.
template <class Core>
SAAP_PRIM void finish_pair(const ScanParams& p, Core& core, const Exchange& area, const Place& at, const Parts& parts, int pass) {
  const i64 slots = static_cast<i64>(pass) * (gridDim.x + p.sequences * p.heads), slot = slots + blockIdx.x + at.pair;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int g = 0; g < kGroups; g++) {
    const int first = pass * kVectors + g * 8, count = p.vectors - first < 8 ? p.vectors - first : 8;
    if (count <= 0) break;
    core.deposit(g, count, area.values + warp * 8 * kStride, area.masses + warp * 8);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count * kE / 2; i += kThreads) {
      const int v = i / (kE / 2), x = i % (kE / 2) * 2;
      saap::softmax_mass whole = saap::softmax_mass::empty();
#pragma unroll
      for (int w = 0; w < kWarps; w++) whole.m = highest(whole.m, mass_of(area.masses[w * 8 + v]));
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        const saap::softmax_mass part = mass_of(area.masses[w * 8 + v]);
        const float2 value = *reinterpret_cast<const float2*>(area.values + (w * 8 + v) * kStride + x);
        const float factor = share(part, whole.m);
        whole.l += factor * part.l, sum.x += factor * value.x, sum.y += factor * value.y;
      }
      const i64 row = static_cast<i64>(at.pair) * p.vectors + first + v, scratch = slot * kVectors + g * 8 + v;
      if (parts.count == 1) {
        const float inverse = whole.inverse();
        store_pair(p.out, row * kE + x, sum.x * inverse, sum.y * inverse);
        if (x == 0) p.lse[row] = whole.lse();
      } else {
        *reinterpret_cast<float2*>(p.partials + scratch * kE + x) = sum;
        if (x == 0) *reinterpret_cast<float2*>(p.masses + scratch * 2) = make_float2(whole.m, whole.l);
      }
    }
    __syncthreads();  // the area is free again, and thread 0 speaks for what all have stored
  }
  note(p, kMerged);
  if (parts.count == 1) return;
  bool last = false;
  if (threadIdx.x == 0) {
    // What the barrier gave this thread to see, whoever counts after it sees too. The last one leaves a zero.
    u32* ticket = p.tickets + static_cast<i64>(pass) * p.sequences * p.heads + at.pair;
    const u32 most = static_cast<u32>(parts.count) - 1;
    last = atomic_inc_acq_rel(ticket, most) >= most;
  }
  const bool merges = __syncthreads_or(last);
  note(p, kTicketed);
  if (merges) merge_parts(p, at.pair, pass, slots + parts.first + at.pair, parts.count);
}
