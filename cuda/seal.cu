// Sealing: the rows of segments are sorted by list number, stably and per KV head; any number of segments of any sequences at
// once. saap_rank says where every row goes and writes the offsets, saap_permute moves the rows to scratch in that order, then
// back. saap_publish writes numbers that the host decides to where they belong.
//
// A job is one segment. Its leading rows may lie in segments that it takes the place of ("old"), sorted there: the tables of
// those name their lists. The others are fresh, in arrival order: their lists are given, or were just assigned.
#include "prims.cuh"

constexpr int kJobInts = 12;
struct Job {
  int sequence;
  int first, rows;    // rows [first, first + rows) of the arena
  int at;             // place of its first row in `order` and in scratch, a multiple of kTileRows
  int slot;           // its table in `tables`
  int old, olds;      // tables of the old segments that it takes the place of, one after the other; their number
  int fresh;          // first fresh row; rows before it lie in old segments
  int fresh_at;       // place of that row in `list_nos` and in `positions`
  int position;       // of the token in that row, and so on; or negative: ids are there already, for every row
  int head, past_head;  // KV heads [head, past_head) move. past_head >= h: the others get their table. Else they get nothing, and
                        // tables old to old + olds - 1 become those of the whole, cut at their bounds; none is written at `slot`
};

struct RankParams {
  const int* jobs;      // (jobs, kJobInts)
  const int* list_nos;  // (h, f), any stride over h: lists of the fresh rows; or null: all are in `pending`
  const int* pending;   // (b, h, N), any strides: list of each row of the arena, or negative: see list_nos; or null
  const int* tables;    // (b, h, S, l + 1), any strides but the last: of old segments
  int* order;           // out (h, t): the row of the arena that comes to each place
  int* new_tables;      // out (jobs, h, l + 1): first row of every run, then the row past the segment
  i64 list_head, pending_sequence, pending_head, table_sequence, table_head, table_segment, order_head;  // strides in elements
  int lists;
};

struct PermuteParams {
  const int* jobs;         // (jobs, kJobInts): those of this launch
  char *keys, *values;     // (b, h, N, d), (b, h, N, e), strides below, rows contiguous
  int* ids;                // (b, h, N)
  const int* positions;    // (f): position of the token in each fresh row; or null: they follow one another from Job::position
  const int* order;        // (h, t): as from saap_rank; or null: back from scratch
  const int* new_tables;   // (jobs, h, l + 1); back from scratch only
  int* tables;             // out (b, h, S, l + 1); back from scratch only
  char *scratch_keys, *scratch_values;  // (heads, places, d), (heads, places, e), contiguous, places = 32 * gridDim.x
  int* scratch_ids;                     // (heads, places)
  i64 key_sequence, key_head, value_sequence, value_head;                        // bytes
  i64 id_sequence, id_head, table_sequence, table_head, table_segment, order_head;  // elements
  int num_jobs, first_head, heads, lists;  // heads: of all, in new_tables
  int key_vectors, value_vectors;          // row lengths in units of 16 bytes
};

struct PublishParams {
  const int4* pieces;  // (m): low and high half of an address, first word, number of words
  const int* words;    // what is written, 4 bytes each
};

namespace {

constexpr int kWarp = 32;
constexpr int kTileRows = 32;  // rows that a block of saap_permute moves
constexpr int kAhead = 4;      // vectors of a thread in flight

__device__ __forceinline__ Job read_job(const int* jobs, int i) {
  const int* from = jobs + i * kJobInts;
  return {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7], from[8], from[9], from[10], from[11]};
}

__device__ __forceinline__ int inclusive_sum(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(~0u, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// The list of a row of the job, in [0, l) whatever the arrays hold.
__device__ __forceinline__ int list_of(const RankParams& p, const Job& job, int head, int row) {
  if (row < job.fresh) {
    const int* table = p.tables + job.sequence * p.table_sequence + head * p.table_head + job.old * p.table_segment;
    for (int i = 1; i < job.olds && row >= table[p.lists]; i++) table += p.table_segment;
    int low = 0, high = p.lists - 1;  // how many of the lists 1, 2, ... begin at the row or before it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (table[middle] <= row) low = middle;
      else high = middle - 1;
    }
    return low;
  }
  int list = p.pending ? p.pending[job.sequence * p.pending_sequence + head * p.pending_head + row] : -1;
  if (list < 0 && p.list_nos) list = p.list_nos[head * p.list_head + job.fresh_at + row - job.fresh];
  return min(max(list, 0), p.lists - 1);
}

}  // namespace

// order and tables of every segment: a stable counting sort of its rows by list number.
//
// Grid (jobs, h, 1): a block sorts one segment of one head. Block: 32 W threads, W <= 32; shared memory (W * l + 32) * 4 bytes.
// Each warp counts and then ranks a contiguous share of the rows, 32 at a time: lanes with equal lists find each other by
// match_any, so counters are written by one lane only. Deterministic: no atomics.
// Preconditions: jobs within the arrays; `order` has places for all of them.
extern "C" __global__ void __launch_bounds__(1024, 1) saap_rank(const __grid_constant__ RankParams p) {
  SAAP_SHARED(int, shared);
  const int head = blockIdx.y, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const Job job = read_job(p.jobs, blockIdx.x);
  if (job.past_head < static_cast<int>(gridDim.y) && (head < job.head || head >= job.past_head)) return;
  const int end = job.first + job.rows;
  const int share = ((job.rows + warps - 1) / warps + kWarp - 1) / kWarp * kWarp;
  const int used = share ? (job.rows + share - 1) / share : 0;  // warps that have rows
  int* order = p.order + head * p.order_head + job.at - job.first;
  int* table = p.new_tables + (static_cast<i64>(blockIdx.x) * gridDim.y + head) * (p.lists + 1);
  int* sums = shared;                      // (W), of the scan over lists
  int* counts = shared + kWarp;            // (W, l): rows of each warp in each list; later where its next row goes
  int* mine = counts + warp * p.lists;

  for (int i = threadIdx.x; i < used * p.lists; i += blockDim.x) counts[i] = 0;
  __syncthreads();

  const i64 begin = job.first + static_cast<i64>(warp) * share;
  const int first = begin < end ? static_cast<int>(begin) : end;
  const int past = share < end - first ? first + share : end;
  // Calls f(row, list, lanes with the same list) for each 32 rows; lanes past the end have list l.
  auto each = [&](auto&& f) {
    int row = first + lane;
    int next = row < past ? list_of(p, job, head, row) : 0;
    for (int from = first; from < past; from += kWarp) {
      const int list = row < past ? next : p.lists;
      const int here = row;
      row += kWarp;
      if (row < past) next = list_of(p, job, head, row);
      f(here, list, __match_any_sync(~0u, list));
    }
  };
  each([&](int, int list, u32 peers) {
    if (list < p.lists && __ffs(peers) - 1 == lane) mine[list] += __popc(peers);
    __syncwarp(~0u);
  });
  __syncthreads();

  // Exclusive sums over (list, warp), lists first.
  int before = job.first;
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
  if (threadIdx.x == 0) table[p.lists] = end;

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

// Rows of the arena to scratch in the order of saap_rank, ids of fresh rows made on the way; or, without an order, from scratch
// to the arena, and the tables to where they belong.
//
// Grid (places / 32, heads, 1): heads [first_head, first_head + heads) and places from that of the first job on; block 256, no
// shared memory. All pointers and byte strides are multiples of 16 (ids and numbers: 4). Deterministic. Entries of order outside
// their segment are clamped.
extern "C" __global__ void __launch_bounds__(256) saap_permute(const __grid_constant__ PermuteParams p) {
  const int head = p.first_head + blockIdx.y, base = p.jobs[3], place = base + blockIdx.x * kTileRows;
  int low = 0, high = p.num_jobs - 1;  // the last job that begins at the place or before it
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.jobs[middle * kJobInts + 3] <= place) low = middle;
    else high = middle - 1;
  }
  const Job job = read_job(p.jobs, low);
  const bool moves = head >= job.head && head < job.past_head, whole = job.past_head >= p.heads;
  const int offset = place - job.at, rows = min(kTileRows, job.rows - offset);
  if (!p.order && offset == 0 && (moves || whole)) {
    const int* from = p.new_tables + (static_cast<i64>(low) * p.heads + head) * (p.lists + 1);
    int* table = p.tables + job.sequence * p.table_sequence + head * p.table_head;
    if (whole) {
      table += job.slot * p.table_segment;
      for (int i = threadIdx.x; i <= p.lists; i += blockDim.x) table[i] = from[i];
    } else {
      table += job.old * p.table_segment;
      for (int s = 0; s < job.olds; s++, table += p.table_segment)
        for (int i = threadIdx.x + 1; i < p.lists; i += blockDim.x)
          table[i] = min(max(from[i], table[0]), table[p.lists]);
    }
  }
  if (!moves) return;
  const int vectors = p.key_vectors + p.value_vectors, total = rows * vectors;
  const i64 in_scratch = static_cast<i64>(blockIdx.y) * gridDim.x * kTileRows + blockIdx.x * kTileRows;
  char* keys = p.keys + job.sequence * p.key_sequence + head * p.key_head;
  char* values = p.values + job.sequence * p.value_sequence + head * p.value_head;
  int* ids = p.ids + job.sequence * p.id_sequence + head * p.id_head;
  char* scratch_keys = p.scratch_keys + in_scratch * p.key_vectors * 16;
  char* scratch_values = p.scratch_values + in_scratch * p.value_vectors * 16;
  const int* order = p.order ? p.order + head * p.order_head + place : nullptr;
  auto in_arena = [&](int row) {
    return order ? min(max(order[row], job.first), job.first + job.rows - 1) : job.first + offset + row;
  };

  if (static_cast<int>(threadIdx.x) < rows) {
    const int row = in_arena(threadIdx.x);
    int* scratch_id = p.scratch_ids + in_scratch + threadIdx.x;
    if (!order) ids[row] = *scratch_id;
    else if (job.position < 0 || row < job.fresh) *scratch_id = ids[row];
    else *scratch_id = p.positions ? p.positions[job.fresh_at + row - job.fresh] : job.position + row - job.fresh;
  }
  for (int from = threadIdx.x; from < total; from += kAhead * blockDim.x) {
    uint4 data[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int v = from + i * blockDim.x, row = v / vectors, at = v - row * vectors;
      if (v >= total) continue;
      const bool is_key = at < p.key_vectors;
      const int width = is_key ? p.key_vectors : p.value_vectors, within = is_key ? at : at - p.key_vectors;
      const i64 x = order ? in_arena(row) : row;
      const char* source = order ? (is_key ? keys : values) : is_key ? scratch_keys : scratch_values;
      data[i] = ld_stream16(source + (x * width + within) * 16);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int v = from + i * blockDim.x, row = v / vectors, at = v - row * vectors;
      if (v >= total) continue;
      const bool is_key = at < p.key_vectors;
      const int width = is_key ? p.key_vectors : p.value_vectors, within = is_key ? at : at - p.key_vectors;
      const i64 x = order ? row : in_arena(row);
      char* to = order ? (is_key ? scratch_keys : scratch_values) : is_key ? keys : values;
      *reinterpret_cast<uint4*>(to + (x * width + within) * 16) = data[i];
    }
  }
}

// Every piece of `words` to its address.
//
// Grid (m, 1, 1), block: any; no shared memory. Preconditions: pieces do not overlap, addresses are multiples of 4.
extern "C" __global__ void __launch_bounds__(128) saap_publish(const __grid_constant__ PublishParams p) {
  const int4 piece = p.pieces[blockIdx.x];
  int* to = reinterpret_cast<int*>(static_cast<u64>(static_cast<u32>(piece.y)) << 32 | static_cast<u32>(piece.x));
  for (int i = threadIdx.x; i < piece.w; i += blockDim.x) to[i] = p.words[piece.z + i];
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_rank() { return sizeof(RankParams); }
extern "C" int saap_sizeof_permute() { return sizeof(PermuteParams); }
extern "C" int saap_sizeof_publish() { return sizeof(PublishParams); }
#endif
