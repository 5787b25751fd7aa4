// Where a selection ends: the best items in order of preference until rows or mass are spent, without sorting them.
//
// Items have a key, the bits of a float that is not negative, and a place in the order of preference among equal keys. A
// histogram over the leading bits of the keys, in which an item counts with its rows and its mass, finds the bin in which the
// selection ends; the items of that bin are ranked if they are few, else the next bits are looked at.
#pragma once
#include "select_block.cuh"

namespace {

constexpr int kBins = 2048, kBinBits = 11, kFirstShift = 20, kFew = 256;
constexpr u32 kNoLimit = 0xffffffffu;
constexpr u32 kNoItem = 0xffffffffu;  // a key that is in no bin

struct Candidate {
  u32 key;
  int place;
  Measure measure;
};

// The last item that is taken, and how many of its rows. Items before it in order of preference are taken whole.
struct Cut {
  u32 key;
  int place;
  u32 rows;

  __device__ __forceinline__ bool whole(u32 item_key, int item_place) const {
    return item_key != kNoItem && (item_key > key || (item_key == key && item_place < place));
  }
};

__device__ __forceinline__ Cut take_nothing() { return {kNoItem, -1, 0}; }
__device__ __forceinline__ Cut take_all() { return {0, 0x7fffffff, 0}; }

struct Bins {
  u32 rows[kBins], mass[kBins];
};

// Shared memory of a search, and of writing what it found.
struct Search {
  union {
    Bins bins;
    Writing writing;
  };
  Measure scan[kWarps];
  Candidate few[kFew];
  Cut cut;
  Measure before;  // the bin's
  int bin;
  u32 found;

  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins.rows[i] = 0, bins.mass[i] = 0;
    if (threadIdx.x == 0) bin = -1, found = 0;
  }

  __device__ __forceinline__ void tally(u32 bin_of_item, Measure x) {
    if (x.rows) atomicAdd(&bins.rows[bin_of_item], x.rows);
    if (x.mass) atomicAdd(&bins.mass[bin_of_item], x.mass);
  }
};

// Ends are absolute, but for the mass if spare >= 0: then it is all of it but that fraction.
struct Limits {
  u32 rows, mass;
  double spare;

  __device__ __forceinline__ bool reached(Measure x) const { return x.rows >= rows || x.mass >= mass; }
};

// The candidate at which a selection ends, by comparing each with each: put(cut) is called by one thread. Four threads have a
// candidate, and a part of the others each.
template <class Put>
__device__ __forceinline__ void rank_candidates(const Candidate* few, int count, const Limits& limits, Put put) {
  constexpr int kTeam = 4;
#pragma unroll 1
  for (int base = 0; base < count; base += kThreads / kTeam) {
    const int i = base + static_cast<int>(threadIdx.x) / kTeam;
    const Candidate item = few[i < count ? i : 0];
    Measure from{0, 0};
#pragma unroll 2
    for (int k = threadIdx.x % kTeam; k < count; k += kTeam) {
      const Candidate other = few[k];
      const bool better = other.key > item.key || (other.key == item.key && other.place < item.place);
      from = from + Measure{better ? other.measure.rows : 0, better ? other.measure.mass : 0};
    }
#pragma unroll
    for (int step = 1; step < kTeam; step *= 2)
      from = from + Measure{__shfl_xor_sync(kAllLanes, from.rows, step), __shfl_xor_sync(kAllLanes, from.mass, step)};
    if (i < count && threadIdx.x % kTeam == 0 && !limits.reached(from) && limits.reached(from + item.measure)) {
      const u32 left = limits.rows - from.rows;
      put(Cut{item.key, item.place, item.measure.rows < left ? item.measure.rows : left});
    }
  }
}

// Finds search.cut, and all threads may read it afterwards. Before: search was cleared, every item whose key is not kNoItem was
// tallied in bin key >> kFirstShift, and a barrier. limits.rows > 0, limits.mass > 0.
// keys (items). order.measure(item): as tallied; items without rows and mass are not looked at. order.place(item): its place
// among equal keys; order.item(place): the inverse.
template <class Order>
__device__ __forceinline__ void find_cut(Search& search, const u32* keys, int items, Limits limits, Order order) {
  constexpr int kPerThread = kBins / kThreads > 0 ? kBins / kThreads : 1;
  u32 low = 0;
  int shift = kFirstShift;
#pragma unroll 1
  for (bool first = true;; first = false) {
    // From the highest bin down.
    Measure mine{0, 0}, total;
    const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kPerThread;
#pragma unroll 2
    for (int i = 0; i < kPerThread; i++) mine = mine + Measure{search.bins.rows[top - i], search.bins.mass[top - i]};
    Measure sum = exclusive_scan(mine, total, search.scan);
    if (first && limits.spare >= 0) {
      const double spare = limits.spare * total.mass;
      const u32 kept = spare < total.mass ? static_cast<u32>(spare) : total.mass;
      limits.mass = total.mass - kept;
      if (limits.mass == 0) {  // it holds before the first item
        if (threadIdx.x == 0) search.cut = take_nothing();
        __syncthreads();
        return;
      }
    }
#pragma unroll 2
    for (int i = 0; i < kPerThread; i++) {
      const Measure before = sum;
      sum = sum + Measure{search.bins.rows[top - i], search.bins.mass[top - i]};
      if (!limits.reached(before) && limits.reached(sum)) search.bin = top - i, search.before = before;
    }
    __syncthreads();
    const int bin = search.bin;
    const Measure before = search.before;
    if (bin < 0) {  // only of the first histogram: a bin that was found holds the end
      if (threadIdx.x == 0) search.cut = take_all();
      __syncthreads();
      return;
    }
    if (limits.rows != kNoLimit) limits.rows -= before.rows;
    if (limits.mass != kNoLimit) limits.mass -= before.mass;
    low += static_cast<u32>(bin) << shift;
    const u32 width = 1u << shift;
    const int next_shift = shift > kBinBits ? shift - kBinBits : 0;
    __syncthreads();
    search.clear();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < items; i += kThreads) {
      const u32 key = keys[i];
      if (key - low >= width) continue;
      const Measure measure = order.measure(i);
      if (measure.rows == 0 && measure.mass == 0) continue;
      const u32 slot = atomicAdd(&search.found, 1u);
      if (slot < kFew) search.few[slot] = {key, order.place(i), measure};
      search.tally((key - low) >> next_shift, measure);
    }
    __syncthreads();
    if (search.found <= kFew) break;
    if (shift == 0) {  // equal keys without end
      Measure sum_before{0, 0};
#pragma unroll 1
      for (int base = 0; base < items && !limits.reached(sum_before); base += kThreads) {
        const int place = base + threadIdx.x, item = place < items ? order.item(place) : 0;
        const bool in = place < items && keys[item] == low;
        const Measure measure = in ? order.measure(item) : Measure{0, 0};
        const Measure from = sum_before + exclusive_scan(measure, total, search.scan), to = from + measure;
        if (!limits.reached(from) && limits.reached(to))
          search.cut = {low, place, measure.rows < limits.rows - from.rows ? measure.rows : limits.rows - from.rows};
        sum_before = sum_before + total;
      }
      __syncthreads();
      return;
    }
    shift = next_shift;
  }
  rank_candidates(search.few, static_cast<int>(search.found), limits, [&](Cut cut) { search.cut = cut; });
  __syncthreads();
}

}  // namespace
