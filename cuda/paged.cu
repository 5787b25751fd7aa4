// Operations on pages of an engine's pool: what a step needs of its sequences, runs counted from list numbers, tokens of chosen
// runs found, new tokens written. The rows are then read by scan.cu with SAAP_PAGED.
//
// A pool has B pages of N tokens, N a multiple of 16; a page holds for every KV head h the list numbers of its tokens, a byte each,
// side by side, at multiples of 16 bytes. Sequence i has its tokens in pages blocks[i], in order. Of meta : int32 (b, 8) of
// backends/codes.py words 0 to 4 are used. Segment s of a sequence is tokens [bounds[s], bounds[s + 1]).
//
// Lengths are read from device memory: grids depend on numbers of sequences alone. A sequence of length 0 is nothing to do,
// whatever its pages say; a page outside the pool is not read.
#include "prims.cuh"

#ifndef SAAP_THREADS
#define SAAP_THREADS 256
#endif

using u8 = unsigned char;

// The list numbers of a batch.
struct PagedLists {
  const u8* lists;    // (B, h, N), strides below
  const int* blocks;  // (b, M), rows `width` apart
  const int* meta;    // (b, 8)
  const int* bounds;  // (b, S + 1)
  int* pieces;        // (b, h, X + S, l): how many tokens of each list a piece has, see Slices
  i64 page_bytes, head_bytes;
  int width, pages, size, segments, nlist;  // M, B, N, S, l
};

struct PlanParams {
  const int* lengths;   // (b)
  const float* shares;  // (layers, h): of the budget
  int* meta;            // out (b, 8)
  int* bounds;          // out (b, S + 1)
  float* centres;       // out (b, S): the middle of each segment
  int* budgets;         // out (layers, b, h): most tokens that are chosen
  u32* tickets;         // out (num_tickets): zeros, for the launches that follow
  double selectivity;
  int sinks, recent, break_even;  // first and last tokens, which are read anyway; a shorter sequence has no segments
  int segments, sequences, layers, heads, num_tickets;
};

struct CountParams {
  PagedLists at;
  int* tables;   // out (b, h, S, l + 1)
  u32* tickets;  // (b, h): zeros before a launch; every launch leaves zeros
  int* flags;    // (1): set to 1 where a list number is l or more, or null
};

struct FindParams {
  PagedLists at;
  const int* tables;  // (b, h, S, l + 1)
  const int* taken;   // (b, h, S, l): how many of each run are chosen, its newest ones; null: every token is
  int* rows;          // out (b, h, t)
  int* counts;        // out (b, h)
  u64* totals;        // (4), or null: added to by what is read, see saap_paged_find
  int most;           // t
  int page_rows, token_rows;  // row numbers from a page to the next, from a token to the next
  int queries;                // of a sequence: what a sequence adds to the totals counts as often
};

struct WriteParams {
  const char *keys, *values;   // (n, h, d), (n, h, e), strides below
  char *pool_keys, *pool_values;
  u8* lists;
  const i64* slots;            // (n): page * N + place; others than those of the pool are left out
  const int* list_nos;         // (h, n), or null: list numbers stay
  i64 key_n, key_h, value_n, value_h;  // strides in bytes, as all below
  i64 page, head, token;       // of the pool's rows, multiples of 16
  i64 list_page, list_head;
  int n, heads, size, pages;
  int key_vectors, value_vectors;  // row lengths in units of 16 bytes
  int aligned;                 // keys, values and their strides are multiples of 16 bytes
};

namespace {

constexpr int kThreads = SAAP_THREADS, kWarps = kThreads / 32, kLists = 256, kGroup = 16;
constexpr u32 kAll = 0xffffffffu;
constexpr int kLength = 0, kSinks = 1, kSealed = 2, kSegments = 3, kNext = 4, kMetaWords = 8;
static_assert(kThreads >= kLists, "a thread has a list");

// How the tokens of a sequence that lie in segments, in groups of 16 positions, are dealt out to the gridDim.x blocks of a pair. What
// a segment has of a slice is a piece; piece (x, s) is number x + s: from each to the next at least one of the two grows.
struct Slices {
  const int* bounds;
  int segments, low, high, first, groups;

  __device__ __forceinline__ Slices(const PagedLists& at, int sequence)
      : bounds(at.bounds + static_cast<i64>(sequence) * (at.segments + 1)) {
    const int used = at.meta[static_cast<i64>(sequence) * kMetaWords + kSegments];
    segments = min(max(used, 0), at.segments);
    low = segments ? bounds[0] : 0, high = segments ? bounds[segments] : 0;
    first = low / kGroup, groups = (high + kGroup - 1) / kGroup - first;
  }

  // Token at which slice x begins, or where the last one ends.
  __device__ __forceinline__ int begin(int x) const {
    const i64 group = first + static_cast<i64>(groups) * x / static_cast<i64>(gridDim.x);
    return min(max(static_cast<int>(group) * kGroup, low), high);
  }

  // Tokens [x, y) of a piece.
  __device__ __forceinline__ int2 piece(int x, int s) const {
    return make_int2(max(begin(x), bounds[s]), min(begin(x + 1), bounds[s + 1]));
  }

  // The last segment that begins at or before a token.
  __device__ __forceinline__ int segment_of(int token) const {
    int s = 0;
    while (s + 1 < segments && bounds[s + 1] <= token) s++;
    return s;
  }
};

// Where the tokens of a sequence lie.
struct Sequence {
  const u8* lists;    // of the head
  const int* blocks;
  i64 page_bytes;
  u32 pages, size;

  __device__ __forceinline__ Sequence(const PagedLists& at, int sequence, int head)
      : lists(at.lists + head * at.head_bytes), blocks(at.blocks + static_cast<i64>(sequence) * at.width),
        page_bytes(at.page_bytes), pages(at.pages), size(at.size) {}

  // List numbers of tokens 16 g to 16 g + 15; there: whether their page is one of the pool.
  __device__ __forceinline__ uint4 numbers(int group, bool& there) const {
    const u32 token = static_cast<u32>(group) * kGroup, index = token / size, page = static_cast<u32>(blocks[index]);
    there = page < pages;
    if (!there) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(lists + page * page_bytes + (token - index * size));
  }

  // Row number of a token.
  __device__ __forceinline__ int row(int token, int page_rows, int token_rows) const {
    const u32 index = static_cast<u32>(token) / size;
    return blocks[index] * page_rows + (token - static_cast<int>(index * size)) * token_rows;
  }
};

__device__ __forceinline__ u32 byte_of(uint4 x, int i) {
  const u32 word = i < 8 ? (i < 4 ? x.x : x.y) : (i < 12 ? x.z : x.w);
  return word >> 8 * (i % 4) & 255u;
}

__device__ __forceinline__ int inclusive_sum(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(kAll, x, step);
    if (lane >= step) x += lower;
  }
  return x;
}

// The sum of x over the threads before this one; total: over all. scratch (kWarps) is free again afterwards.
__device__ __forceinline__ int exclusive_sum(int x, int& total, int* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, within = inclusive_sum(x);
  if (lane == 31) scratch[warp] = within;
  __syncthreads();
  const int warps = inclusive_sum(lane < kWarps ? scratch[lane] : 0), before = __shfl_sync(kAll, warps, warp ? warp - 1 : 0);
  total = __shfl_sync(kAll, warps, 31);
  __syncthreads();
  return (warp ? before : 0) + within - x;
}

__device__ __forceinline__ uint4 read_vector(const char* from, bool aligned) {
  if (aligned) return ld_stream16(from);
  const u16* x = reinterpret_cast<const u16*>(from);
  u32 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = static_cast<u32>(x[2 * i]) | static_cast<u32>(x[2 * i + 1]) << 16;
  return make_uint4(w[0], w[1], w[2], w[3]);
}

}  // namespace

// What a step needs to know of its sequences: octaves of distance from the newest token, as invlists/octaves.py has them, their
// middles, and budgets ceil(selectivity * share * tokens in segments), at most all of them. Where S segments do not suffice, the oldest
// ones are one.
//
// Grid b blocks; block SAAP_THREADS; no shared memory. Deterministic.
extern "C" __global__ void __launch_bounds__(kThreads) saap_paged_plan(const __grid_constant__ PlanParams p) {
  const int i = blockIdx.x, length = max(p.lengths[i], 0);
  const i64 n = length, recent = p.recent, sinks = p.sinks;
  int segments = 0;
  if (n >= p.break_even && n - recent > sinks) {
    segments = 1;
    while (n - (recent << segments) > sinks) segments++;
    // The oldest joins its neighbour if it is less than half as long.
    const i64 last = n - (recent << (segments - 1));
    if (segments > 1 && 2 * (last - sinks) < recent << (segments - 2)) segments--;
    segments = min(segments, p.segments);
  }
  const int low = segments ? p.sinks : 0, high = segments ? static_cast<int>(n - recent) : 0;
  auto bound = [&](int s) {
    return !segments ? 0 : s == 0 ? low : s >= segments ? high : static_cast<int>(n - (recent << (segments - s)));
  };
  int* bounds = p.bounds + static_cast<i64>(i) * (p.segments + 1);
  for (int s = threadIdx.x; s <= p.segments; s += kThreads) {
    bounds[s] = bound(s);
    if (s < p.segments)
      p.centres[static_cast<i64>(i) * p.segments + s] = 0.5f * static_cast<float>(bound(s) + bound(s + 1) - 1);
  }
  if (threadIdx.x < kMetaWords) {
    const int w = threadIdx.x, known = w == kLength || w == kNext ? length : w == kSinks ? low : w == kSealed ? high : 0;
    p.meta[i * kMetaWords + w] = w == kSegments ? segments : known;
  }
  const int chosen = high - low;
  for (int k = threadIdx.x; k < p.layers * p.heads; k += kThreads) {
    const int layer = k / p.heads, head = k - layer * p.heads;
    const double wanted = ceil(p.selectivity * static_cast<double>(p.shares[k]) * chosen - 1e-6);
    p.budgets[(static_cast<i64>(layer) * p.sequences + i) * p.heads + head] =
        wanted < chosen ? static_cast<int>(wanted > 0 ? wanted : 0) : chosen;
  }
  for (int k = i * kThreads + threadIdx.x; k < p.num_tickets; k += gridDim.x * kThreads) p.tickets[k] = 0;
}

// Offsets of runs as if the tokens of a sequence were sorted by segment, list and position; and the tokens of each list in every
// piece, for saap_paged_find in the same grid. Tables of segments that a sequence has not stay as they are. List numbers of l or
// more belong to no run.
//
// Grid (X, h, b), any X; block SAAP_THREADS; shared memory (SAAP_THREADS / 32 * 256 + 1) * 4 bytes.
// Preconditions: l <= 256; segments begin and end within the pages. Deterministic.
extern "C" __global__ void __launch_bounds__(kThreads) saap_paged_count(const __grid_constant__ CountParams p) {
  SAAP_SHARED(int, sizes);  // (kWarps, kLists)
  const int x = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 pair = static_cast<i64>(sequence) * gridDim.y + head;
  const Slices slices(p.at, sequence);
  if (slices.segments == 0) return;  // all blocks of the pair
  const Sequence of(p.at, sequence, head);
  int* const pieces = p.at.pieces + pair * (gridDim.x + p.at.segments) * p.at.nlist;
  const int begin = slices.begin(x), end = slices.begin(x + 1);
  bool odd = false;
#pragma unroll 1
  for (int s = begin < end ? slices.segment_of(begin) : slices.segments; s < slices.segments && slices.bounds[s] < end; s++) {
    const int2 piece = slices.piece(x, s);
    if (piece.x >= piece.y) continue;
    for (int i = threadIdx.x; i < kWarps * kLists; i += kThreads) sizes[i] = 0;
    __syncthreads();
    int* const mine = sizes + warp * kLists;
#pragma unroll 1
    for (int group = piece.x / kGroup + threadIdx.x; group * kGroup < piece.y; group += kThreads) {
      bool there;
      const uint4 numbers = of.numbers(group, there);
      const int from = piece.x - group * kGroup, to = piece.y - group * kGroup;
#pragma unroll
      for (int i = 0; i < kGroup; i++)
        if (there && i >= from && i < to) atomicAdd(mine + byte_of(numbers, i), 1);
    }
    __syncthreads();
    if (threadIdx.x < kLists) {
      int sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sum += sizes[w * kLists + threadIdx.x];
      if (threadIdx.x < p.at.nlist) pieces[static_cast<i64>(x + s) * p.at.nlist + threadIdx.x] = sum;
      else odd |= sum > 0;
    }
    __syncthreads();
  }
  if (p.flags && odd) atomicOr(p.flags, 1);
  __syncthreads();  // thread 0 speaks for what all have stored
  if (threadIdx.x == 0) {
    const u32 most = gridDim.x - 1;
    sizes[kWarps * kLists] = most == 0 || atomic_inc_acq_rel(p.tickets + pair, most) >= most;
  }
  __syncthreads();
  if (!sizes[kWarps * kLists]) return;
  // The last block of a pair: a warp has a segment, a lane eight lists.
#pragma unroll 1
  for (int s = warp; s < slices.segments; s += kWarps) {
    int sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
    for (int k = 0; k < static_cast<int>(gridDim.x); k++) {
      const int2 piece = slices.piece(k, s);
      if (piece.x >= piece.y) continue;
      const int* from = pieces + static_cast<i64>(k + s) * p.at.nlist + lane;
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += lane + 32 * i < p.at.nlist ? from[32 * i] : 0;
    }
    int* const table = p.tables + (pair * p.at.segments + s) * (p.at.nlist + 1);
    int base = slices.bounds[s] - slices.low;
    if (lane == 0) table[0] = base;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int through = base + inclusive_sum(sum[i]);
      if (lane + 32 * i < p.at.nlist) table[1 + lane + 32 * i] = through;
      base = __shfl_sync(kAll, through, 31);
    }
  }
}

// Row numbers of what is read of each pair: tokens before the segments, those chosen of each run, tokens behind the segments, in
// that order, each of the three in order of position; and how many. Numbers behind the t-th are dropped. Of a sequence without
// segments, or without `taken`, every token.
// totals: queries of sequences with segments and without, rows read for those with, and rows that they have, of all heads.
//
// Grid and block as of the saap_paged_count before it, which counted the same list numbers; shared memory 2448 bytes.
// Deterministic.
extern "C" __global__ void __launch_bounds__(kThreads, 4) saap_paged_find(const __grid_constant__ FindParams p) {
  SAAP_SHARED(int, shared);
  int *const scratch = shared, *const partial = shared + 32, *const left = partial + kLists, *const num_partial = left + kLists;
  u8* const whole = reinterpret_cast<u8*>(num_partial + 4);  // (kLists): whether what is left of a run in the piece is read
  const int x = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z, parts = gridDim.x, nlist = p.at.nlist;
  const i64 pair = static_cast<i64>(sequence) * gridDim.y + head;
  const int length = max(p.at.meta[static_cast<i64>(sequence) * kMetaWords + kLength], 0);
  const Slices slices(p.at, sequence);
  const Sequence of(p.at, sequence, head);
  int* const rows = p.rows + pair * p.most;
  const u64 queries = p.queries;
  auto put = [&](int at, int token) {
    if (at < p.most) rows[at] = of.row(token, p.page_rows, p.token_rows);
  };
  if (slices.segments == 0 || !p.taken) {
    for (int token = x * kThreads + threadIdx.x; token < length; token += parts * kThreads) put(token, token);
    if (x > 0 || threadIdx.x > 0) return;
    p.counts[pair] = min(length, p.most);
    if (p.totals && head == 0 && length > 0) atomicAdd(p.totals + 1, queries);
    return;
  }
  if (x == 0)
    for (int token = threadIdx.x; token < slices.low; token += kThreads) put(token, token);

  const int* const pieces = p.at.pieces + pair * (parts + p.at.segments) * nlist;
  const int* const tables = p.tables + pair * p.at.segments * (nlist + 1);
  const int* const taken = p.taken + pair * p.at.segments * nlist;
  const int begin = slices.begin(x), end = slices.begin(x + 1), first = slices.segment_of(begin), list = threadIdx.x;
  // Of the thread's list: what is read in front of the slice, and tokens of the first segment in front of it.
  int before = 0, rank = 0;
  if (list < nlist) {
#pragma unroll 2
    for (int s = 0; s < first; s++) before += taken[s * nlist + list];
#pragma unroll 1
    for (int k = x - 1; k >= 0; k--) {
      const int2 piece = slices.piece(k, first);
      if (piece.x < piece.y) rank += pieces[static_cast<i64>(k + first) * nlist + list];
      if (slices.begin(k) <= slices.bounds[first]) break;
    }
    const int* run = tables + first * (nlist + 1) + list;
    before += max(0, rank - (run[1] - run[0] - taken[first * nlist + list]));
  }
  int at;
  exclusive_sum(before, at, scratch);
  at += slices.low;

#pragma unroll 1
  for (int s = first; s < slices.segments && slices.bounds[s] < end; s++) {
    const int2 piece = slices.piece(x, s);
    if (piece.x >= piece.y) continue;
    if (threadIdx.x == 0) *num_partial = 0;
    __syncthreads();
    if (list < kLists) {
      bool all = false;
      if (list < nlist) {
        const int* run = tables + s * (nlist + 1) + list;
        const int here = pieces[static_cast<i64>(x + s) * nlist + list];
        const int skipped = run[1] - run[0] - taken[s * nlist + list] - (s == first ? rank : 0);  // of those in the piece
        all = skipped <= 0;
        if (skipped > 0 && skipped < here) {
          const int index = atomicAdd(num_partial, 1);
          partial[index] = list, left[index] = skipped;
        }
      }
      whole[list] = all;
    }
    __syncthreads();
    const int runs_cut = *num_partial;
#pragma unroll 1
    for (int base = piece.x / kGroup; base * kGroup < piece.y; base += kThreads) {
      const int group = base + threadIdx.x, from = piece.x - group * kGroup, to = piece.y - group * kGroup;
      bool there = false;
      uint4 numbers = make_uint4(0, 0, 0, 0);
      if (group * kGroup < piece.y) numbers = of.numbers(group, there);
      u32 chosen = 0;
#pragma unroll
      for (int i = 0; i < kGroup; i++)
        if (there && i >= from && i < to && whole[byte_of(numbers, i)]) chosen |= 1u << i;
      // Runs that begin to be read within the piece: seldom more than one of all.
#pragma unroll 1
      for (int k = 0; k < runs_cut; k++) {
        u32 same = 0;
#pragma unroll
        for (int i = 0; i < kGroup; i++)
          if (there && i >= from && i < to && byte_of(numbers, i) == static_cast<u32>(partial[k])) same |= 1u << i;
        const int skipped = left[k];
        int total, skip = exclusive_sum(__popc(same), total, scratch);
        for (; same; same &= same - 1, skip++)
          if (skip >= skipped) chosen |= same & (0u - same);
        if (threadIdx.x == 0) left[k] = skipped - total;  // after the barriers of the sum, before those of the next
      }
      int total, to_row = at + exclusive_sum(__popc(chosen), total, scratch);
      for (; chosen; chosen &= chosen - 1, to_row++) put(to_row, group * kGroup + __ffs(static_cast<int>(chosen)) - 1);
      at += total;
    }
    __syncthreads();
  }
  if (x + 1 < parts) return;
  for (int token = slices.high + threadIdx.x; token < length; token += kThreads) put(at + token - slices.high, token);
  if (threadIdx.x > 0) return;
  const int count = min(at + length - slices.high, p.most);
  p.counts[pair] = count;
  if (!p.totals) return;
  if (head == 0) atomicAdd(p.totals, queries);
  atomicAdd(p.totals + 2, queries * static_cast<u64>(count));
  atomicAdd(p.totals + 3, queries * static_cast<u64>(length));
}

// Rows and list numbers of new tokens, where their slots say.
//
// Grid any number of blocks; block SAAP_THREADS; no shared memory. Precondition: n * h * (key_vectors + value_vectors) < 2^31 -
// gridDim.x * SAAP_THREADS; no slot twice. Deterministic.
extern "C" __global__ void __launch_bounds__(kThreads) saap_paged_write(const __grid_constant__ WriteParams p) {
  const u32 vectors = p.key_vectors + p.value_vectors, total = static_cast<u32>(p.n) * p.heads * vectors;
#pragma unroll 2
  for (u32 v = blockIdx.x * kThreads + threadIdx.x; v < total; v += gridDim.x * kThreads) {
    const u32 line = v / vectors, at = v - line * vectors, token = line / static_cast<u32>(p.heads), head = line - token * p.heads;
    const i64 slot = p.slots[token];
    if (slot < 0 || slot >= static_cast<i64>(p.pages) * p.size) continue;
    const u32 page = static_cast<u32>(slot) / static_cast<u32>(p.size), place = static_cast<u32>(slot) - page * p.size;
    const bool key = at < static_cast<u32>(p.key_vectors);
    const i64 offset = (key ? at : at - p.key_vectors) * 16;
    const char* from = key ? p.keys + token * p.key_n + head * p.key_h : p.values + token * p.value_n + head * p.value_h;
    char* to = (key ? p.pool_keys : p.pool_values) + page * p.page + head * p.head + place * p.token;
    *reinterpret_cast<uint4*>(to + offset) = read_vector(from + offset, p.aligned);
    if (at == 0 && p.list_nos)
      p.lists[page * p.list_page + head * p.list_head + place] = static_cast<u8>(p.list_nos[static_cast<i64>(head) * p.n + token]);
  }
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_paged_plan() { return sizeof(PlanParams); }
extern "C" int saap_sizeof_paged_count() { return sizeof(CountParams); }
extern "C" int saap_sizeof_paged_find() { return sizeof(FindParams); }
extern "C" int saap_sizeof_paged_write() { return sizeof(WriteParams); }
#endif
