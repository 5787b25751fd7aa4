// From scores to rows: which runs of each (sequence, KV head) are read, and which enter through their means.
#include "select_weights.cuh"

namespace {

constexpr int kFixedBytes = (sizeof(Fixed) + 127) / 128 * 128;
constexpr int kNumSegments = 3, kNextPosition = 4, kMeans = 5, kMetaWords = 8;

// What is selected, in the order of preference among equal weights: newer segments first, then lower lists.
struct Order {
  const Selection& of;
  float units;
  bool tail;  // runs that enter through their means: each counts as one

  __device__ __forceinline__ Measure measure(int item) const {
    if (tail) return {0, 1};
    if (SAAP_LISTS) return {of.rows_of_list(item), 1};
    const int s = item / of.runs.lists;
    return of.measure(of.runs.length(s, item - s * of.runs.lists), __uint_as_float(of.keys[item]), units);
  }
  __device__ __forceinline__ int place(int item) const {
    if (SAAP_LISTS) return item;
    const int s = item / of.runs.lists;
    return item + (of.segments - 1 - 2 * s) * of.runs.lists;
  }
  __device__ __forceinline__ int item(int place) const { return this->place(place); }  // its own inverse
};

// What is read of a run: all, nothing, or its newest rows.
__device__ __forceinline__ Stretch read_of(const Selection& of, const Cut& cut, int segment, int list) {
  const int item = SAAP_LISTS ? list : segment * of.runs.lists + list;
  const u32 key = of.keys[item];
  if (key < cut.key) return {0, 0};
  const int place = SAAP_LISTS ? list : (of.segments - 1 - segment) * of.runs.lists + list, n = of.runs.length(segment, list);
  int taken = cut.whole(key, place) ? n : 0;
  if (key == cut.key && place == cut.place) {
    i64 left = cut.rows;
    for (int s = segment + 1; s < of.segments && SAAP_LISTS; s++) left -= of.runs.length(s, list);
    taken = left < n ? left > 0 ? static_cast<int>(left) : 0 : n;
  }
  return {of.runs.end(segment, list) - taken, taken};
}

// Makes the keys of the runs that may enter through their means their masses, and tallies them; the others are no items.
__device__ __forceinline__ void find_unread(const Selection& of, const Cut& cut, int means) {
  const int items = of.segments * of.runs.lists;
#pragma unroll 1
  for (int run = threadIdx.x; run < items; run += kThreads) {
    const int s = run / of.runs.lists, list = run - s * of.runs.lists, n = of.runs.length(s, list);
    const bool unread = s < means && n > 0 && read_of(of, cut, s, list).n == 0;
    const float mass = fminf(static_cast<float>(n) * __uint_as_float(of.keys[run]), kMost);
    of.keys[run] = unread ? __float_as_uint(mass) : kNoItem;
    if (unread) of.tally(mass, {0, 1});
  }
}

}  // namespace

// Backend.probe of backends/base.py, with budgets of their own for every (sequence, KV head): rows, and the runs of the tail.
// Weights are float32, equal if their bits are. Rows and run numbers are written ascending; what lies behind them stays as it is.
//
// Mass is counted in parts of 2^-31 of the whole, at least one for a run of any weight.
// Lengths that a table gives as negative count as none, so that nothing is written out of place whatever it holds.
// Grid (h, b); block SAAP_THREADS, a power of two from 64 to 1024.
// Shared memory: kFixedBytes, 4 * j bytes, rounded up to 16, and 4 * room(S, l) unless SAAP_FAR.
// Preconditions: m <= 32; S * (l + 1) < 2^31; SAAP_LISTS is nprobe > 0; with it or without size_weighted, entries and unread_mass are
// null. With SAAP_TAKEN there is no tail, no SAAP_LISTS, and t_cap bounds the budget only.
// Deterministic: sums of floats have a fixed order, and what atomics add are integers.
extern "C" __global__ void __launch_bounds__(kThreads, 1) saap_select(const __grid_constant__ SelectParams p) {
  SAAP_SHARED(char, shared);
  const int head = blockIdx.x, sequence = blockIdx.y;
  const i64 row = static_cast<i64>(sequence) * p.h + head;
  const int* meta = p.meta + static_cast<i64>(sequence) * kMetaWords;

  Selection of;
  of.fixed = reinterpret_cast<Fixed*>(shared);
  of.share = reinterpret_cast<float*>(shared + kFixedBytes);
  of.bend = SAAP_FAR ? p.workspace + row * room(p.segments, p.l) : of.share + (p.j + 3) / 4 * 4;
  of.place = of.bend + p.segments * kColumns;
  of.keys = reinterpret_cast<u32*>(of.place + p.segments);
  Search& search = of.fixed->search;
  of.z = p.z + row * p.j * p.l;
  of.a = p.a && p.size_weighted ? p.a + row * p.j * (p.knots + 1) : nullptr;
  of.runs = {p.tables + row * p.segments * (p.l + 1), p.l};
  of.j = p.j, of.segments = clamp(meta[kNumSegments], 0, p.segments);
  of.knots = of.a && !SAAP_LISTS ? p.knots : 0, of.stride = p.knots + 1;
  of.size_weighted = p.size_weighted, of.by_mass = p.unread_mass != nullptr;
  const bool with_tail = !SAAP_LISTS && p.entries;
  const int budget = clamp(p.budgets[row], 0, p.t_cap), entries = with_tail ? clamp(p.entries[row], 0, p.x_cap) : 0;
  const int runs = of.segments * p.l, items = SAAP_LISTS ? p.l : runs;
  const bool something = runs > 0 && (budget > 0 || entries > 0);

  Limits limits{static_cast<u32>(budget), SAAP_LISTS ? static_cast<u32>(p.nprobe) : kNoLimit, -1.0};
  float units = 0.f;
  if (something) {
    search.clear();
    if (threadIdx.x / 32 == kWarps - 1) of.find_shares();
    of.find_places(p.centres + static_cast<i64>(sequence) * p.segments, meta[kNextPosition], p.first_knot);
    __syncthreads();
    const float total = of.weigh_all(units);
    if (p.unread_mass && p.unread_mass[head] >= 0.f) {
      const double whole = static_cast<double>(total) * of.fixed->most_share;
      limits.spare = whole > 0 ? static_cast<double>(p.unread_mass[head]) * p.j / whole : 1.0;
    }
  }
#pragma unroll 1
  for (int tail = 0; tail < (with_tail ? 2 : 1); tail++) {
    Cut cut = take_nothing();
    if (something && limits.rows > 0 && limits.mass > 0) {
      find_cut(search, of.keys, items, limits, Order{of, units, tail != 0});
      cut = search.cut;
    }
#if SAAP_TAKEN
    static_assert(!SAAP_LISTS, "runs are what is taken");
#pragma unroll 1
    for (int run = threadIdx.x; run < runs; run += kThreads) {
      const bool may = something && of.keys[run] >= cut.key && of.keys[run] != kNoItem;
      const int segment = run / p.l;
      p.rows[row * p.segments * p.l + run] = may ? read_of(of, cut, segment, run - segment * p.l).n : 0;
    }
    return;
#endif
    const int most = tail ? p.x_cap : p.t_cap;
    const int count = write_stretches(
        something ? runs : 0, (tail ? p.tail : p.rows) + row * most, most, search.writing,
        [&](int run) {
          const u32 key = of.keys[SAAP_LISTS ? run % p.l : run];
          return key >= cut.key && key != kNoItem;
        },
        [&](int run) {
          const int segment = run / p.l, list = run - segment * p.l;
          if (!tail) return read_of(of, cut, segment, list);
          const u32 key = of.keys[run];
          const int place = (of.segments - 1 - segment) * p.l + list;
          return Stretch{run, cut.whole(key, place) || (key == cut.key && place == cut.place)};
        });
    if (threadIdx.x == 0) (tail ? p.tail_counts : p.counts)[row] = count;
    if (tail || !with_tail || !something) continue;
    search.clear();
    __syncthreads();
    find_unread(of, cut, clamp(meta[kMeans], 0, of.segments));
    __syncthreads();
    limits = {kNoLimit, static_cast<u32>(entries), -1.0};
  }
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_select() { return sizeof(SelectParams); }
extern "C" int saap_sizeof_select_fixed() { return kFixedBytes; }
#endif
