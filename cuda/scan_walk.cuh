// Which tokens a warp reads, and how they get into shared memory: the list of every pair cut into tiles, the tiles of all
// pairs in one row, the row split over the blocks. Nothing is scheduled: a block finds its place from the counts alone. One
// warp reads them, and what it makes of them is all that the block goes by: its warps agree, whatever happens to the counts.
#pragma once
#include "scan_params.cuh"

constexpr float kSlack = 2.f;  // tiles that a block may have more so that none ends two pairs

// The list of one pair: entries [0, sinks) are the rows of that number, [sinks, listed) are rows[i - sinks], or those of `runs` runs
// one after the other, [listed, rows) are rows i + shift; then, in tiles of their own, `tail` entries for the means of runs. Of codes
// there are none: tail is then the number of tokens behind the last coded one, and sinks are counted from the first.
struct Span {
  int sinks, listed, rows, shift, tail, runs;
  SAAP_PRIM int tiles() const { return ceil_div(rows, kTile) + (SAAP_CODED ? 0 : ceil_div(tail, kTile)); }
};

SAAP_PRIM Span span_of(const ScanParams& p, int pair) {
  if (SAAP_PAGED) {
    const int listed = clamp(p.counts[pair], 0, p.max_rows);
    return {0, listed, listed, 0, 0, 0};
  }
  // All loads before the first use of one.
  const int4 meta = *reinterpret_cast<const int4*>(p.meta + static_cast<i64>(divided(pair, p.inverse_heads)) * 8);
  const int runs = p.runs && !p.dense ? p.run_counts[pair] : 0;
  const int count = (p.rows || p.runs) && !p.dense ? p.counts[pair] : 0, tail = p.tail && !p.dense ? p.tail_counts[pair] : 0;
#if SAAP_CODED
  const int4 span = p.spans[divided(pair, p.inverse_heads)];
  const int last = clamp(span.y, 0, p.capacity), always = clamp(span.z, 0, last);
  const int first = clamp(span.x, 0, always), low = clamp(span.w - first, 0, always - first), num = clamp(runs, 0, p.max_runs);
  const int chosen = low + (p.runs && !num ? 0 : clamp(count, 0, p.max_rows));
  return {low, chosen, chosen + last - always, always - chosen, max(meta.x - first, 0), num};
#endif
  const int length = clamp(meta.x, 0, p.capacity);
  if (p.dense) return {0, 0, length, 0, 0, 0};
  int sinks = clamp(meta.y, 0, length), sealed = clamp(meta.z, 0, length);
  if (sealed < sinks) sinks = sealed = 0;  // nothing is sealed: every row is recent
  const int num_runs = clamp(runs, 0, p.max_runs), listed = sinks + (p.runs && !num_runs ? 0 : clamp(count, 0, p.max_rows));
  return {sinks, listed, listed + length - sealed, sealed - listed, clamp(tail, 0, p.max_tail), num_runs};
}

// How many leading entries of the rows of a list query vector `vector` sees.
SAAP_PRIM int seen_entries(const ScanParams& p, const Span& span, int vector) {
  const int query = vector - p.num_queries * divided(vector, p.inverse_queries);
  const int causal = span.rows - p.num_queries + 1 + query + (SAAP_CODED ? span.tail : 0);
  return !p.causal ? span.rows : SAAP_PAGED || causal > span.listed ? causal : span.listed;
}

// `total` tiles, the first of them `offset` in the row, spread evenly over `parts` blocks from `block` on: the first `longer` of
// them take one tile more.
struct Split {
  int offset, block, each, longer;
  SAAP_PRIM int first(int part) const { return offset + part * each + (part < longer ? part : longer); }
  SAAP_PRIM int block_of(int tile) const {
    const int bound = longer * (each + 1), at = tile - offset;
    const bool behind = at >= bound;
    const u32 past = behind ? at - bound : at, size = behind ? each : each + 1;
    return block + (behind ? longer : 0) + static_cast<int>(past / size);
  }
};

// A pair in the row of tiles: its tiles are [begin, end). Of its runs every stride-th, `samples` in all, is in shared memory, from
// `first` on.
struct alignas(16) Place {
  int pair, begin, end, first, stride, samples;
  Span span;
};

// What a block has to do, in shared memory: tiles [begin, last) of the row. Those before `until` are of the pairs in `places`,
// the others wait for the next ones.
struct alignas(16) Work {
  int begin, last, until, count;  // count: of places
  int pair, before, total;        // to go on: the next pair, the tiles before it, all tiles
  int empty;                      // whether one of this block's share of the pairs is
  Split split;
  Place places[kPlaces];
  u32 ends[kRuns], shifts[kRuns];  // of runs: where they end in the list, past the sinks, and what makes rows of its entries
};
static_assert(sizeof(Work) == kWorkBytes, "as the launcher counts it");

SAAP_PRIM int inclusive_sum(int x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int lower = __shfl_up_sync(kAll, x, o);
    if (lane >= o) x += lower;
  }
  return x;
}

// The pairs that a block looks after if they are empty: [blockIdx.x * share, blockIdx.x * share + share).
SAAP_PRIM int empty_share(const ScanParams& p) {
  return static_cast<int>((static_cast<u32>(p.sequences * p.heads) + gridDim.x - 1) / gridDim.x);
}

// Tiles [begin, last) of the row, of `total`, to be found from pair `first` on, the tiles of which start at `before`. known: the
// lane holds the span of pair first + lane, and `end` is where its tiles end.
struct Task {
  int begin, last, total, first, before;
  bool known;
  Span span;
  int end;
};

// One warp: the pairs of a task's tiles; no more than fit.
SAAP_PRIM void fill_places(const ScanParams& p, Work& work, Task task) {
  const int begin = task.begin, last = task.last, total = task.total;
  int first = task.first, before = task.before, end = task.end;
  bool known = task.known;
  Span span = task.span;
  const int lane = threadIdx.x % 32, pairs = p.sequences * p.heads;
  for (;; first += 32) {
    if (!known) {
      span = Span{0, 0, 0, 0, 0, 0};
      if (first + lane < pairs) span = span_of(p, first + lane);
      end = before + inclusive_sum(span.tiles());
    }
    known = false;
    // Within bounds, and without a gap, also where counts have changed since they were summed up.
    end = end < total ? end : total;
    const int lower = __shfl_up_sync(kAll, end, 1), start = lane ? lower : before;
    before = __shfl_sync(kAll, end, 31);
    const bool mine = start < end && end > begin && start < last;
    const u32 chosen = __ballot_sync(kAll, mine);
    const int index = __popc(chosen & ((1u << lane) - 1)), room = kRuns / (chosen ? __popc(chosen) : 1);
    const int stride = span.runs > room ? ceil_div(span.runs, room) : 1;
    const int samples = stride > 1 ? ceil_div(span.runs, stride) : span.runs;
    if (mine) work.places[index] = Place{first + lane, start, end, index * room, stride, samples, span};
    if (chosen || first + 32 >= pairs || before >= last) {
      __syncwarp();  // lanes may have taken their arguments out of the work
      if (lane == 0) {
        work.begin = begin, work.last = last, work.until = before < last ? before : last, work.count = __popc(chosen);
        work.pair = first + 32, work.before = before, work.total = total;
      }
      return;
    }
  }
}

// One warp: how the tiles are split, and which of them are the block's: none if it has no task.
SAAP_PRIM Task plan(const ScanParams& p, Work& work) {
  const int lane = threadIdx.x % 32, pairs = p.sequences * p.heads, block = blockIdx.x, grid = gridDim.x;
  const int each = (pairs + 31) / 32, share = empty_share(p);
  Span span{0, 0, 0, 0, 0, 0};
  int tiles = 0;
  bool empty = false;
#pragma unroll 1
  for (int i = lane * each; i < lane * each + each && i < pairs; i++) {
    span = span_of(p, i);
    tiles += span.tiles();
    empty |= span.tiles() == 0 && static_cast<u32>(i - block * share) < static_cast<u32>(share);
  }
  const int end = inclusive_sum(tiles), total = __shfl_sync(kAll, end, 31);
  const int wanted = (total + kWarps - 1) / kWarps, blocks = wanted < 1 ? 1 : wanted < grid ? wanted : grid;

  // Few pairs get whole blocks, where that makes no block much longer: a block then ends one pair instead of two.
  int offset = 0, of = total, first = 0, parts = blocks;
  if (each == 1) {
    const float even = __fdividef(static_cast<float>(total), static_cast<float>(blocks));
    const float ratio = __fdividef(static_cast<float>(blocks), static_cast<float>(total));
    const int edge = end == total ? blocks : static_cast<int>(static_cast<float>(end) * ratio + 0.5f);
    const int lower = __shfl_up_sync(kAll, edge, 1), low = lane ? lower : 0;
    const bool fine = tiles == 0 || static_cast<float>(tiles) <= static_cast<float>(edge - low) * (even + kSlack);
    if (__all_sync(kAll, fine) && block < blocks) {
      const int owner = __ffs(__ballot_sync(kAll, edge > block)) - 1;
      first = __shfl_sync(kAll, low, owner), parts = __shfl_sync(kAll, edge, owner) - first;
      of = __shfl_sync(kAll, tiles, owner), offset = __shfl_sync(kAll, end, owner) - of;
    }
  }
  const int quotient = static_cast<int>(static_cast<u32>(of) / static_cast<u32>(parts));
  const Split split{offset, first, quotient, of - quotient * parts};
  empty = __any_sync(kAll, empty);
  if (lane == 0) work.split = split, work.empty = empty, work.begin = work.last = work.count = 0;
  const Task none{0, 0, 0, 0, 0, false, span, 0};
  if (block >= blocks || total == 0) return none;
  const int begin = split.first(block - first), last = split.first(block - first + 1);
  const int owner = __ffs(__ballot_sync(kAll, end > begin)) - 1;
  const int before = __shfl_sync(kAll, end - tiles, owner);
  const bool known = each == 1;
  return {begin, last, total, known ? 0 : owner * each, known ? 0 : before, known, span, end};
}

// All threads, after the places are filled and before a barrier: the runs of their pairs, of each the last in a stride.
SAAP_PRIM void load_runs(const ScanParams& p, Work& work) {
#pragma unroll 1
  for (int i = 0; i < work.count; i++) {
    const Place& at = work.places[i];
    const int2* runs = p.runs + static_cast<i64>(at.pair) * p.max_runs;
#pragma unroll 1
    for (int k = threadIdx.x; k < at.samples; k += kThreads) {
      const int last = (k + 1) * at.stride - 1;
      const int2 run = runs[last < at.span.runs ? last : at.span.runs - 1];
      work.ends[at.first + k] = run.y, work.shifts[at.first + k] = static_cast<u32>(run.x) - static_cast<u32>(run.y);
    }
  }
}

// The first of n runs that ends behind an entry, `ends` being `step` apart; n - 1 if none does.
SAAP_PRIM int run_behind(const u32* ends, int step, int n, u32 entry) {
  int low = 0;
#pragma unroll 1
  for (int jump = 1 << (31 - __clz(n)); jump; jump >>= 1)
    if (low + jump < n && ends[(low + jump - 1) * step] <= entry) low += jump;
  return low;
}

// Of a run, the row of its i-th entry less its first row: i from 1 to 2^21. As a quotient of 41 bits by 21, from one of floats, which
// is at most 1 off; of one too large for rows anything.
SAAP_PRIM int sampled(int i, int probability, int offset) {
  const i64 from = (static_cast<i64>(i) << 20) - offset + probability - 1;
  const float about = __fdividef(static_cast<float>(from), static_cast<float>(probability));
  int quotient = static_cast<int>(fmaxf(fminf(about, 1073741824.f), -1073741824.f));
  const i64 left = from - static_cast<i64>(quotient) * probability;
  quotient += left < 0 ? -1 : left >= probability ? 1 : 0;
  return quotient - 1;
}

// The row of an entry past the sinks; bias: of its logit, as far as selections are weighted.
SAAP_PRIM int row_of(const ScanParams& p, const Work& work, const Place& at, u32 entry, float& bias) {
  const int sample = run_behind(work.ends + at.first, 1, at.samples, entry);
  u32 shift = work.shifts[at.first + sample];
  [[maybe_unused]] int number = sample;
  if (at.stride > 1) {
    const int first = sample * at.stride, left = at.span.runs - first;
    const int2* runs = p.runs + static_cast<i64>(at.pair) * p.max_runs + first;
    const int within = run_behind(reinterpret_cast<const u32*>(&runs->y), 2, left < at.stride ? left : at.stride, entry);
    shift = static_cast<u32>(runs[within].x) - static_cast<u32>(runs[within].y);
    number = first + within;
  }
#if SAAP_WEIGHTED
  const Weight weight = p.weights[static_cast<i64>(at.pair) * p.max_runs + number];
  bias = weight.bias * saap::kLog2e;
  const int i = static_cast<int>(entry - weight.before + 1), probability = clamp(weight.probability, 1, 1 << 20);
  if (probability < 1 << 20) return static_cast<int>(weight.before + shift + sampled(i, probability, weight.offset));
#endif
  return static_cast<int>(entry + shift);
}

// The tokens of tiles by their numbers, kTile lanes to a tile: a row of the arena or a run, -1: none. of: of which pair, times
// two, and one more for runs; -1 where there is no such tile. bias: of the logit, in log2 units, where selections are weighted.
struct Numbers {
  int number, of;
  float bias = 0.f;
};
constexpr int kTogether = 32 / kTile;  // tiles whose numbers a warp loads at once

// Starts to load the lane's number of `tile`; `at` is its place or one before it.
SAAP_PRIM Numbers number_tile(const ScanParams& p, const Work& work, int& at, int tile, int until) {
  if (tile >= until) return {-1, -1};
  while (tile >= work.places[at].end) at++;
  const Place& place = work.places[at];
  const int first = (tile - place.begin) * kTile, i = first + threadIdx.x % kTile;
  const bool tail = first >= place.span.rows;
  const int past = i - ceil_div(place.span.rows, kTile) * kTile;
  const int* from = nullptr;
  int number = -1;
  float bias = 0.f;
  if (tail) {
    if (past < place.span.tail) from = p.tail + static_cast<i64>(place.pair) * p.max_tail + past;
  } else if (i < place.span.rows) {
    number = i < place.span.sinks ? i : i + place.span.shift;
#if SAAP_CODED
    if (i < place.span.sinks) number = i + p.spans[divided(place.pair, p.inverse_heads)].x;
#endif
    if (i >= place.span.sinks && i < place.span.listed) {
      if (!SAAP_PAGED && p.runs) number = row_of(p, work, place, i - place.span.sinks, bias);
      else from = p.rows + static_cast<i64>(place.pair) * p.max_rows + i - place.span.sinks;
    }
  }
  if (from) number = *from;
  return {number, place.pair * 2 + tail, bias};
}

// Starts the copies of a tile's rows of `dim` elements out of `base`, `stride` bytes apart; lane i holds the number of row i, -1
// for one of zeros.
template <int dim>
SAAP_PRIM void gather(char* to, const char* base, int stride, int number) {
  using Shape = RowShape<dim>;
  constexpr int kLanes = (Shape::kChunks & -Shape::kChunks) < 32 ? (Shape::kChunks & -Shape::kChunks) : 32;  // to a row
  const int lane = threadIdx.x % 32, column = lane % kLanes;
#pragma unroll 4  // no more: the addresses would take the registers of the value sums
  for (int r = 0; r < kTile; r += 32 / kLanes) {
    const int token = r + lane / kLanes, row = __shfl_sync(kAll, number, token);
    const char* from = base + static_cast<i64>(row) * stride + column * 16;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; c += kLanes)
      cp_async16(to + Shape::offset(token, c + column), from + c * 16, row >= 0 && c + column < Shape::kFilled);
  }
}

// The same of rows of `words` words each, one after the other in `base`, to rows `stride` bytes apart.
template <int words, int stride>
SAAP_PRIM void gather_codes(char* to, const char* base, int number) {
#pragma unroll 4
  for (int i = threadIdx.x % 32; i - threadIdx.x % 32 < kTile * words; i += 32) {
    const int token = i / words, word = i - token * words, row = __shfl_sync(kAll, number, token < kTile ? token : 0);
    if (token >= kTile) continue;
    char* const place = to + token * stride + word * 4;
    if (row >= 0) cp_async4(place, base + (static_cast<i64>(row) * words + word) * 4);
    else *reinterpret_cast<u32*>(place) = 0;
  }
}

// Starts the copies of the tile whose numbers the `part`-th lanes hold into a stage, as one group. Returns what is added to the
// logit of token `lane` % kTile, in log2 units: -inf for one that does not exist, the logarithm of its length for a run that is read
// through its means, what the selection says for a row.
SAAP_PRIM float copy_tile(const ScanParams& p, const Numbers& held, int part, char* stage) {
  const int source = part * kTile + threadIdx.x % kTile, of = __shfl_sync(kAll, held.of, source);
  int number = __shfl_sync(kAll, held.number, source);
  const float own = SAAP_WEIGHTED ? __shfl_sync(kAll, held.bias, source) : 0.f;
  float bias = -INFINITY;
  if (of >= 0) {
    const bool tail = of & 1;
    const int pair = of / 2, limit = tail ? p.max_means * p.lists : p.capacity;
    if (static_cast<u32>(number) >= static_cast<u32>(limit)) number = -1;
#if SAAP_PAGED
    const i64 first = (pair - p.heads * divided(pair, p.inverse_heads)) * p.head_bytes;
    gather<kD>(stage, static_cast<const char*>(p.keys) + first, p.row_bytes, number);
    gather<kE>(stage + KeyShape::kTileBytes, static_cast<const char*>(p.values) + first, p.row_bytes, number);
#elif SAAP_CODED
    const i64 first = static_cast<i64>(pair) * p.capacity;
    gather_codes<kKeyWords, kKeyStride>(stage, static_cast<const char*>(p.keys) + first * (kKeyWords * 4), number);
    const char* values = static_cast<const char*>(p.values) + first * (kValueWords * 4);
    gather_codes<kValueWords, kValueStride>(stage + kTile * kKeyStride, values, number);
#else
    const i64 first = static_cast<i64>(pair) * limit;
    const char* keys = static_cast<const char*>(tail ? p.mean_keys : p.keys) + first * KeyShape::kBytes;
    const char* values = static_cast<const char*>(tail ? p.mean_values : p.values) + first * ValueShape::kBytes;
    gather<kD>(stage, keys, KeyShape::kBytes, number);
    gather<kE>(stage + KeyShape::kTileBytes, values, ValueShape::kBytes, number);
#endif
    if (number >= 0) {
      bias = own;
      if (tail) {
        const i64 table = static_cast<i64>(pair) * p.max_segments * (p.lists + 1);
        const int* run = p.tables + table + number + number / p.lists;
        const u32 size = static_cast<u32>(run[1]) - static_cast<u32>(run[0]);
        bias = run[1] > run[0] ? log2_fast(static_cast<float>(size)) : -INFINITY;
      }
    }
  }
  cp_async_commit();
  return bias;
}
