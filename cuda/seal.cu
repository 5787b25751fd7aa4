// Sealing: the rows of segments are sorted by list number, stably and per KV head. Three steps: saap_rank says where every row
// goes and writes the offsets, saap_permute moves the rows to scratch in that order, saap_permute moves them back. Beside them
// saap_run_lists, which reads list numbers off the offsets of segments that are about to be merged.
//
// "Covered rows" are those of all segments of a call, which follow one another: rows [base, base + rows) of the arena.
#include "prims.cuh"

struct RankParams {
  const int* list_nos;    // (h, rows), any stride over h: list of every covered row, clamped to [0, l)
  const int* segments;    // (s, 2): first row and number of rows of each segment; or null: one segment, all covered rows
  int* order;             // out (h, rows): the row that comes to each covered row
  int* tables;            // out (h, s, l + 1), any strides over h and s: first row of every run, then the row past the segment
  i64 list_head, order_head, table_head, table_segment;  // strides in elements
  int base, rows, lists;
};

struct PermuteParams {
  const char *keys, *values;   // source, rows as in `order`; strides below
  const int* ids;              // source, or null: no ids are moved
  char *to_keys, *to_values;   // (h, rows, d), (h, rows, e), rows contiguous; not overlapping the source
  int* to_ids;                 // (h, rows)
  const int* order;            // (h, rows): source row of each row, plus base; or null: the same row
  i64 key_head, value_head, id_head;           // strides of the source over h: bytes, bytes, elements
  i64 key_row, value_row;                      // strides of the source over rows, in bytes
  i64 to_key_head, to_value_head, to_id_head;  // of the destination over h: bytes, bytes, elements
  i64 order_head;                              // elements
  int base, rows;
  int key_vectors, value_vectors;  // row lengths in units of 16 bytes
};

struct RunListsParams {
  const int* segments;  // (s, 2): first row and number of rows of each segment
  const int* tables;    // (h, s, l + 1), any strides over h and s
  int* list_nos;        // out (h, rows)
  i64 table_head, table_segment, list_head;
  int base, rows, lists;
};

namespace {

constexpr int kWarp = 32;
constexpr int kTileRows = 32;  // rows that a block of saap_permute moves
constexpr int kAhead = 4;      // vectors of a thread in flight

// Rows [first, past) of segment s, within the covered ones whatever the array holds.
struct Range {
  int first, past;
};
__device__ __forceinline__ Range segment_rows(const int* segments, int s, int base, int rows) {
  if (!segments) return {base, base + rows};
  const int first = min(max(segments[2 * s], base), base + rows);
  return {first, first + min(max(segments[2 * s + 1], 0), base + rows - first)};
}

__device__ __forceinline__ int inclusive_sum(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(~0u, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

}  // namespace

// order and tables of every segment: a stable counting sort of its rows by list number.
//
// Grid (s, h, 1): a block sorts one segment of one head. Block: 32 W threads, W <= 32; shared memory (W * l + 32) * 4 bytes.
// Each warp counts and then ranks a contiguous share of the rows, 32 at a time: lanes with equal lists find each other by
// match_any, so counters are written by one lane only. Deterministic: no atomics.
extern "C" __global__ void __launch_bounds__(1024) saap_rank(const __grid_constant__ RankParams p) {
  SAAP_SHARED(int, shared);
  const int segment = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const Range range = segment_rows(p.segments, segment, p.base, p.rows);
  const int share = ((range.past - range.first + warps - 1) / warps + kWarp - 1) / kWarp * kWarp;
  const int used = share ? (range.past - range.first + share - 1) / share : 0;  // warps that have rows
  const int* list_nos = p.list_nos + head * p.list_head - p.base;
  int* order = p.order + head * p.order_head - p.base;
  int* table = p.tables + head * p.table_head + segment * p.table_segment;
  int* sums = shared;                      // (W), of the scan over lists
  int* counts = shared + kWarp;            // (W, l): rows of each warp in each list; later where its next row goes
  int* mine = counts + warp * p.lists;

  for (int i = threadIdx.x; i < used * p.lists; i += blockDim.x) counts[i] = 0;
  __syncthreads();

  const i64 begin = range.first + static_cast<i64>(warp) * share;
  const int first = begin < range.past ? static_cast<int>(begin) : range.past;
  const int past = share < range.past - first ? first + share : range.past;
  // Calls f(row, list, lanes with the same list) for each 32 rows; lanes past the end have list l.
  auto each = [&](auto&& f) {
    int row = first + lane;
    int next = row < past ? list_nos[row] : 0;
    for (int from = first; from < past; from += kWarp) {
      const int list = row < past ? min(max(next, 0), p.lists - 1) : p.lists;
      const int here = row;
      row += kWarp;
      if (row < past) next = list_nos[row];
      f(here, list, __match_any_sync(~0u, list));
    }
  };
  each([&](int, int list, u32 peers) {
    if (list < p.lists && __ffs(peers) - 1 == lane) mine[list] += __popc(peers);
    __syncwarp(~0u);
  });
  __syncthreads();

  // Exclusive sums over (list, warp), lists first.
  int before = range.first;
  for (int group = 0; group < p.lists; group += blockDim.x) {
    const int list = group + threadIdx.x;
    int total = 0;
    if (list < p.lists)
      for (int w = 0; w < used; w++) {
        const int count = counts[w * p.lists + list];
        counts[w * p.lists + list] = total;
        total += count;
      }
    const int inclusive = inclusive_sum(total, lane);
    if (lane == kWarp - 1) sums[warp] = inclusive;
    __syncthreads();
    if (warp == 0) {
      const int sum = inclusive_sum(lane < warps ? sums[lane] : 0, lane);
      if (lane < warps) sums[lane] = sum;
    }
    __syncthreads();
    const int at = before + (warp ? sums[warp - 1] : 0) + inclusive - total;
    if (list < p.lists) {
      table[list] = at;
      for (int w = 0; w < used; w++) counts[w * p.lists + list] += at;
    }
    before += sums[warps - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) table[p.lists] = range.past;

  each([&](int row, int list, u32 peers) {
    int at = 0;
    if (list < p.lists) at = mine[list] + __popc(peers & ((1u << lane) - 1));
    __syncwarp(~0u);
    if (list < p.lists) {
      order[at] = row;
      if (__ffs(peers) - 1 == lane) mine[list] += __popc(peers);
    }
    __syncwarp(~0u);
  });
}

// Row i of the destination = row order[i] - base of the source: keys, values and ids of every head.
//
// Grid (ceil(rows / 32), h, 1), block 256, no shared memory. All pointers and byte strides are multiples of 16 (ids: 4).
// Deterministic. Entries of order outside the covered rows are clamped.
extern "C" __global__ void __launch_bounds__(256) saap_permute(const __grid_constant__ PermuteParams p) {
  const int head = blockIdx.y, first = blockIdx.x * kTileRows;
  const int rows = min(kTileRows, p.rows - first), vectors = p.key_vectors + p.value_vectors, total = rows * vectors;
  const int* order = p.order ? p.order + head * p.order_head + first : nullptr;
  auto source = [&](int row) { return order ? min(max(order[row] - p.base, 0), p.rows - 1) : first + row; };
  const char *keys = p.keys + head * p.key_head, *values = p.values + head * p.value_head;
  char* to_keys = p.to_keys + head * p.to_key_head + static_cast<i64>(first) * p.key_vectors * 16;
  char* to_values = p.to_values + head * p.to_value_head + static_cast<i64>(first) * p.value_vectors * 16;

  if (p.ids && static_cast<int>(threadIdx.x) < rows)
    p.to_ids[head * p.to_id_head + first + threadIdx.x] = p.ids[head * p.id_head + source(threadIdx.x)];
  for (int from = threadIdx.x; from < total; from += kAhead * blockDim.x) {
    uint4 data[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int v = from + i * blockDim.x, row = v / vectors, at = v - row * vectors;
      if (v >= total) continue;
      const int x = source(row);
      data[i] = ld_stream16(at < p.key_vectors ? keys + x * p.key_row + at * 16
                                               : values + x * p.value_row + (at - p.key_vectors) * 16);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int v = from + i * blockDim.x, row = v / vectors, at = v - row * vectors;
      if (v >= total) continue;
      char* to = at < p.key_vectors ? to_keys + (row * p.key_vectors + at) * 16
                                    : to_values + (row * p.value_vectors + at - p.key_vectors) * 16;
      *reinterpret_cast<uint4*>(to) = data[i];
    }
  }
}

// list_nos of every covered row, from the offsets of its segment: how many of the lists 1, 2, ... begin at it or before it.
//
// Grid (x, h, s), any x >= 1; block: at most 256 threads; no shared memory. Deterministic.
extern "C" __global__ void __launch_bounds__(256) saap_run_lists(const __grid_constant__ RunListsParams p) {
  const int segment = blockIdx.z, head = blockIdx.y;
  const Range range = segment_rows(p.segments, segment, p.base, p.rows);
  const int* table = p.tables + head * p.table_head + segment * p.table_segment;
  int* list_nos = p.list_nos + head * p.list_head - p.base;
  for (i64 row = range.first + static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; row < range.past;
       row += static_cast<i64>(gridDim.x) * blockDim.x) {
    int low = 0, high = p.lists - 1;  // the list is in [low, high]
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (table[middle] <= row) low = middle;
      else high = middle - 1;
    }
    list_nos[row] = low;
  }
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_rank() { return sizeof(RankParams); }
extern "C" int saap_sizeof_permute() { return sizeof(PermuteParams); }
extern "C" int saap_sizeof_run_lists() { return sizeof(RunListsParams); }
#endif
