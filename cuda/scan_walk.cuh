// Which tokens a warp reads, and how they get into shared memory: the list of every pair cut into tiles, the tiles of all
// pairs in one row, the row split evenly over the blocks. Nothing is scheduled: a block finds its place from the counts alone.
#pragma once
#include "scan_params.cuh"

// The list of one pair: entries [0, sinks) are the rows of that number, [sinks, listed) are rows[i - sinks], [listed, rows)
// are rows i + shift; then, in tiles of their own, `tail` entries for the means of runs.
struct Span {
  int sinks, listed, rows, shift, tail;
  SAAP_PRIM int tiles() const { return ceil_div(rows, kTile) + ceil_div(tail, kTile); }
};

SAAP_PRIM Span span_of(const ScanParams& p, int pair) {
  const int4 meta = *reinterpret_cast<const int4*>(p.meta + static_cast<i64>(pair / p.heads) * 8);
  const int length = clamp(meta.x, 0, p.capacity);
  if (p.dense) return {0, 0, length, 0, 0};
  int sinks = clamp(meta.y, 0, length), sealed = clamp(meta.z, 0, length);
  if (sealed < sinks) sinks = sealed = 0;  // nothing is sealed: every row is recent
  const int listed = sinks + (p.rows ? clamp(p.counts[pair], 0, p.max_rows) : 0);
  return {sinks, listed, listed + length - sealed, sealed - listed, p.tail ? clamp(p.tail_counts[pair], 0, p.max_tail) : 0};
}

// How many leading entries of the rows of a list query `query` sees.
SAAP_PRIM int seen_entries(const ScanParams& p, const Span& span, int query) {
  const int causal = span.rows - p.num_queries + 1 + query;
  return !p.causal ? span.rows : causal > span.listed ? causal : span.listed;
}

// An even split of `total` tiles over `parts` blocks: the first `longer` of them take one tile more.
struct Split {
  int each, longer;
  SAAP_PRIM Split(int total, int parts) : each(total / parts), longer(total % parts) {}
  SAAP_PRIM int first(int block) const { return block * each + (block < longer ? block : longer); }
  SAAP_PRIM int block_of(int tile) const {
    const int bound = longer * (each + 1);
    return tile < bound ? tile / (each + 1) : longer + (tile - bound) / each;
  }
};

// A pair in the row of tiles: its tiles are [begin, end).
struct Place {
  int pair = -1, begin = 0, end = 0;
  Span span{};
};

// Moves forward to the pair that tile `tile` >= at.end belongs to. Warp-uniform.
SAAP_PRIM void seek(const ScanParams& p, Place& at, int tile) {
  const int lane = threadIdx.x % 32, pairs = p.sequences * p.heads;
  int before = at.end;
  for (int first = at.pair + 1; first < pairs; first += 32) {
    Span span{};
    if (first + lane < pairs) span = span_of(p, first + lane);
    const int tiles = span.tiles();
    int end = before + tiles;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const int lower = __shfl_up_sync(kAll, end - before, o);
      if (lane >= o) end += lower;
    }
    const u32 beyond = __ballot_sync(kAll, end > tile);
    if (beyond) {
      const int found = __ffs(beyond) - 1;
      at.pair = first + found;
      at.end = __shfl_sync(kAll, end, found);
      at.begin = at.end - __shfl_sync(kAll, tiles, found);
      at.span.sinks = __shfl_sync(kAll, span.sinks, found);
      at.span.listed = __shfl_sync(kAll, span.listed, found);
      at.span.rows = __shfl_sync(kAll, span.rows, found);
      at.span.shift = __shfl_sync(kAll, span.shift, found);
      at.span.tail = __shfl_sync(kAll, span.tail, found);
      return;
    }
    before = __shfl_sync(kAll, end, 31);
  }
}

// The tokens of a tile by their numbers: lane i < kTile holds that of token i, a row of the arena or a run. -1: none.
struct Numbers {
  int number;
  int pair;  // -1: there is no such tile
  bool tail;
};

// Starts to load the numbers of `tile`, which lies at or past `at`.
SAAP_PRIM Numbers number_tile(const ScanParams& p, Place& at, int tile, int last) {
  if (tile >= last) return {-1, -1, false};
  if (tile >= at.end) seek(p, at, tile);
  const int i = (tile - at.begin) * kTile + threadIdx.x % kTile;
  const Span& span = at.span;
  const int past = i - ceil_div(span.rows, kTile) * kTile;
  Numbers found{-1, at.pair, (tile - at.begin) * kTile >= span.rows};
  if (found.tail) {
    if (past < span.tail) found.number = p.tail[static_cast<i64>(at.pair) * p.max_tail + past];
  } else if (i < span.rows) {
    found.number = i < span.sinks   ? i
                   : i < span.listed ? p.rows[static_cast<i64>(at.pair) * p.max_rows + i - span.sinks]
                                     : i + span.shift;
  }
  return found;
}

// Starts the copies of a tile's rows of `dim` elements out of `base`; lane i holds the number of row i, -1 for one of zeros.
template <int dim>
SAAP_PRIM void gather(char* to, const char* base, int number) {
  using Shape = RowShape<dim>;
  constexpr int kLanes = (Shape::kChunks & -Shape::kChunks) < 32 ? (Shape::kChunks & -Shape::kChunks) : 32;  // to a row
  const int lane = threadIdx.x % 32, column = lane % kLanes;
#pragma unroll 4  // no more: the addresses would take the registers of the value sums
  for (int r = 0; r < kTile; r += 32 / kLanes) {
    const int token = r + lane / kLanes, row = __shfl_sync(kAll, number, token);
    const char* from = base + static_cast<i64>(row) * Shape::kBytes + column * 16;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; c += kLanes)
      cp_async16(to + Shape::offset(token, c + column), from + c * 16, row >= 0 && c + column < Shape::kFilled);
  }
}

// Starts the copies of a tile into a stage, as one group. Returns what is added to the logit of token `lane` % kTile, in log2
// units: -inf for one that does not exist, the logarithm of its length for a run.
SAAP_PRIM float copy_tile(const ScanParams& p, const Numbers& tokens, char* stage) {
  float bias = -INFINITY;
  if (tokens.pair >= 0) {
    const int limit = tokens.tail ? p.max_means * p.lists : p.capacity;
    const i64 first = static_cast<i64>(tokens.pair) * limit;
    const char* keys = static_cast<const char*>(tokens.tail ? p.mean_keys : p.keys) + first * KeyShape::kBytes;
    const char* values = static_cast<const char*>(tokens.tail ? p.mean_values : p.values) + first * ValueShape::kBytes;
    const int number = static_cast<u32>(tokens.number) < static_cast<u32>(limit) ? tokens.number : -1;
    gather<kD>(stage, keys, number);
    gather<kE>(stage + KeyShape::kTileBytes, values, number);
    if (number >= 0) {
      bias = 0.f;
      if (tokens.tail) {
        const i64 table = static_cast<i64>(tokens.pair) * p.max_segments * (p.lists + 1);
        const int* run = p.tables + table + number + number / p.lists;
        const u32 size = static_cast<u32>(run[1]) - static_cast<u32>(run[0]);
        bias = run[1] > run[0] ? log2_fast(static_cast<float>(size)) : -INFINITY;
      }
    }
  }
  cp_async_commit();
  return bias;
}
