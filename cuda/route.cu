// The query router: from queries to a score for every list, all query vectors of a batch against each weight once.
#include "route_units.cuh"

#ifndef SAAP_DTYPE
#define SAAP_DTYPE kBF16  // of the queries
#endif
#ifndef SAAP_D32
#define SAAP_D32 4  // d, rounded up to units of 32
#endif
#ifndef SAAP_U32
#define SAAP_U32 2  // u, likewise; 0: a linear router
#endif
#ifndef SAAP_TILES
#define SAAP_TILES 1  // columns of 8 query vectors that pass over the weights together
#endif
#ifndef SAAP_WARPS
#define SAAP_WARPS 4
#endif
#ifndef SAAP_RING
#define SAAP_RING 10  // units of 1 KiB that a warp has in flight
#endif

struct RouteParams {
  const void* queries;       // dtype SAAP_DTYPE (b, h, j, d)
  const u16* hidden;         // fp16 (h, 2 U, D, 2, 32, 8): tiles of 16 units as fragments, see below
  const float* bias_hidden;  // (h, 32 U)
  const u16* out;            // fp16 (h, out_tiles, D + U, 2, 32, 8): 16 outputs a tile; the first D units weigh the query
  const float* bias_out;     // (h, 16 out_tiles)
  const float* inv_freq;     // (pairs), or null
  const float* cosine;       // (b * q, pairs), where inv_freq is null and pairs > 0
  const float* sine;         // (b * q, pairs), likewise
  const int* meta;           // (b, 8), read with inv_freq only
  float* z;                  // out (b, h, j, l)
  float* a;                  // out (b, h, j, outputs - l); null if outputs == l
  float scale;               // of rotated dims, see Rotation in backends/base.py
  int b, h, j, q, d;         // j = g * q
  int pairs, interleaved;    // rotated pairs: r / 2 <= d / 2
  int l, outputs, out_tiles;
};

namespace {

constexpr int kD = SAAP_D32, kU = SAAP_U32, kK = kD + kU, kTiles = SAAP_TILES, kWarps = SAAP_WARPS, kRing = SAAP_RING;
constexpr int kThreads = 32 * kWarps, kVectors = 8 * kTiles, kHiddenTiles = 2 * kU;
constexpr int kRow = 16 * (4 * kK + 1);   // bytes of a query vector and its hidden units; the odd piece spreads rows over banks
constexpr int kChains = kTiles == 1 ? 2 : 1;  // independent sums, where a single column would wait for each product
constexpr int kHeads = 4;                 // query vectors of one position that a thread rotates at a time
constexpr int kNextPosition = 4, kMetaWords = 8;

// The weights of one warp, in the order in which it uses them: for each batch of vectors its tiles of hidden units, then its
// tiles of outputs. A lane copies the pieces that it reads itself, so the ring needs no barrier.
struct Feed {
  const char *hidden, *out;  // of this head and lane
  char* ring;                // of this warp and lane
  int warp, first, step, out_tiles, rounds;
  const char* next;
  int left, unit, output, copied, used;

  __device__ __forceinline__ void start() {
    left = 0, copied = 0, used = 0;
    rewind();
    for (int i = 0; i < kRing; i++) copy();
  }

  __device__ __forceinline__ void rewind() { unit = warp, output = first; }

  // Starts the copy of the next unit, if there is one; closes a group either way, so that groups count units.
  __device__ __forceinline__ void copy() {
    while (left == 0 && rounds > 0) {
      if (unit < kHiddenTiles) {
        next = hidden + static_cast<i64>(unit) * kD * kUnit, left = kD, unit += kWarps;
      } else if (output < out_tiles) {
        next = out + static_cast<i64>(output) * kK * kUnit, left = kK, output += step;
      } else {
        rounds--;
        rewind();
      }
    }
    if (left > 0) {
      char* slot = ring + copied * kUnit;
      cp_async16(slot, next, true);
      cp_async16(slot + kUnit / 2, next + kUnit / 2, true);
      next += kUnit, left--;
    }
    cp_async_commit();
    copied = copied + 1 == kRing ? 0 : copied + 1;
  }

  // The two fragments of the unit whose turn it is; its slot is filled anew.
  __device__ __forceinline__ void take(u32 (&low)[4], u32 (&high)[4]) {
    cp_async_wait<kRing - 1>();
    const char* slot = ring + used * kUnit;
    const uint4 x = *reinterpret_cast<const uint4*>(slot), y = *reinterpret_cast<const uint4*>(slot + kUnit / 2);
    low[0] = x.x, low[1] = x.y, low[2] = x.z, low[3] = x.w;
    high[0] = y.x, high[1] = y.y, high[2] = y.z, high[3] = y.w;
    used = used + 1 == kRing ? 0 : used + 1;
    copy();
  }
};

struct Sums {
  float c[kTiles][kChains][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int k = 0; k < kChains; k++)
#pragma unroll
        for (int x = 0; x < 4; x++) c[i][k][x] = 0.f;
  }

  // Adds the next `units` units of weights times columns from 32 * column of the vectors. tiles: those that hold vectors.
  __device__ __forceinline__ void add(Feed& feed, const char* rows, int column, int units, int tiles) {
    const int lane = threadIdx.x % 32;
    const char* mine = rows + lane % 8 * kRow + (4 * column + lane / 8) * 16;
#pragma unroll 4
    for (int k = 0; k < units; k++) {
      u32 low[4], high[4];
      feed.take(low, high);
#pragma unroll
      for (int i = 0; i < kTiles; i++)
        if (i < tiles) {
          u32 x[4];
          ldmatrix4(x, mine + i * 8 * kRow + k * 64);
          mma_16816<kF16>(c[i][0], low, x[0], x[1]);
          mma_16816<kF16>(c[i][kChains - 1], high, x[2], x[3]);
        }
    }
  }

  __device__ __forceinline__ float at(int i, int x) const {
    return kChains == 1 ? c[i][0][x] : c[i][0][x] + c[i][kChains - 1][x];
  }
};

// Query vectors of a KV head are counted by position first: vector n is head n % g of position n / g, and position
// sequence * q + i is query i of a sequence. Vector 0 of a position; a head of the group is q rows further on.
__device__ __forceinline__ int row_of(const RouteParams& p, int position, int head) {
  const u32 q = p.q, sequence = static_cast<u32>(position) / q;
  return (static_cast<int>(sequence) * p.h + head) * p.j + (position - static_cast<int>(sequence * q));
}

// Vectors first, first + 1, ... with RoPE undone, in fp16, one a row of `rows`; zeros behind them and behind d. places: which
// row of (b, h, j) each is.
__device__ __forceinline__ void fill_rows(const RouteParams& p, char* rows, int* places, int head, int first, int count) {
  const u32 g = static_cast<u32>(p.j) / static_cast<u32>(p.q), blocks = (g + kHeads - 1) / kHeads, pairs = p.pairs;
  const int position0 = static_cast<u32>(first) / g, position1 = static_cast<u32>(first + count - 1) / g;
  auto put = [&](int vector, int dim, float x) {
    *reinterpret_cast<u16*>(rows + vector * kRow + dim * 2) = narrow<kF16>(clamp_f16(x));
  };
  for (u32 item = threadIdx.x; item < (position1 - position0 + 1) * blocks * pairs; item += kThreads) {
    const u32 rest = item / pairs, pair = item - rest * pairs, beyond = rest / blocks;
    const int position = position0 + static_cast<int>(beyond), group = static_cast<int>(g);
    // The vectors of this thread: kHeads of a position, as far as they are among those wanted.
    const int from = position * group + static_cast<int>(rest - beyond * blocks) * kHeads, row = row_of(p, position, head);
    int stop = (position + 1) * group < first + count ? (position + 1) * group : first + count;
    stop = from + kHeads < stop ? from + kHeads : stop;
    const int x_dim = p.interleaved ? 2 * pair : pair, y_dim = p.interleaved ? 2 * pair + 1 : pair + pairs;
    float x[kHeads], y[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; i++) {
      const bool mine = from + i >= first && from + i < stop;
      const i64 at = mine ? static_cast<i64>(row + (from + i - position * group) * p.q) * p.d : 0;
      x[i] = mine ? load<SAAP_DTYPE>(p.queries, at + x_dim) : 0.f;
      y[i] = mine ? load<SAAP_DTYPE>(p.queries, at + y_dim) : 0.f;
    }
    float sine, cosine;
    if (p.inv_freq) {
      const int sequence = static_cast<u32>(position) / static_cast<u32>(p.q);
      const int where = p.meta[sequence * kMetaWords + kNextPosition] - p.q + position - sequence * p.q;
      // The product is rounded to float32, as models do; from there on the angle is exact.
      const float angle = static_cast<float>(where) * p.inv_freq[pair];
      sinpi_cospi(static_cast<double>(angle) * 0.31830988618379067154, &sine, &cosine);
    } else {
      const i64 at = static_cast<i64>(position) * pairs + pair;
      sine = p.sine[at], cosine = p.cosine[at];
    }
#pragma unroll
    for (int i = 0; i < kHeads; i++) {
      if (from + i < first || from + i >= stop) continue;
      put(from + i - first, x_dim, (x[i] * cosine + y[i] * sine) * p.scale);
      put(from + i - first, y_dim, (y[i] * cosine - x[i] * sine) * p.scale);
    }
  }
  auto place_of = [&](int n) {
    const int position = static_cast<u32>(n) / g;
    return row_of(p, position, head) + (n - position * static_cast<int>(g)) * p.q;
  };
  const int plain = 32 * kD - 2 * p.pairs;  // dims that are not rotated, and zeros up to a whole unit
#pragma unroll 1
  for (int item = threadIdx.x; item < count * plain; item += kThreads) {
    const int vector = item / plain, dim = 2 * p.pairs + item - vector * plain;
    put(vector, dim, dim < p.d ? load<SAAP_DTYPE>(p.queries, static_cast<i64>(place_of(first + vector)) * p.d + dim) : 0.f);
  }
  // Vectors that are not there fill the last column; their hidden units come out finite by themselves.
  const int padding = (8 - count % 8) % 8;
#pragma unroll 1
  for (int item = threadIdx.x; item < padding * 16 * kD; item += kThreads)
    *reinterpret_cast<u32*>(rows + (count + item / (16 * kD)) * kRow + item % (16 * kD) * 4) = 0;
#pragma unroll 1
  for (int n = threadIdx.x; n < count; n += kThreads) places[n] = place_of(first + n);
}

// The biases of a tile's rows that a lane has in its fragment.
struct Bias {
  float of[2];

  __device__ __forceinline__ void read(const float* bias, int tile, int tiles) {
    const int row = tile * 16 + threadIdx.x % 32 / 4;
    of[0] = tile < tiles ? bias[row] : 0.f, of[1] = tile < tiles ? bias[row + 8] : 0.f;
  }
};

// Hidden units of a tile, behind the vectors that they belong to.
__device__ __forceinline__ void write_units(const Sums& sums, const Bias& bias, char* rows, int tile, int tiles) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int column = 32 * kD + tile * 16 + half * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int x = 0; x < 2; x++)
        if (i < tiles)
          *reinterpret_cast<u16*>(rows + (i * 8 + lane % 4 * 2 + x) * kRow + column * 2) =
              narrow<kF16>(clamp_f16(silu(sums.at(i, half * 2 + x) + bias.of[half])));
  }
}

// Writes one tile of outputs. An output is a score of a list, or one of the distance term and c.
__device__ __forceinline__ void write_tile(
    const RouteParams& p, const Sums& sums, const Bias& bias, const int* places, int tile, int count) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int output = tile * 16 + half * 8 + lane / 4;
    if (output >= p.outputs) continue;
    const bool list = output < p.l;
    float* to = list ? p.z + output : p.a + (output - p.l);
    const i64 stride = list ? p.l : p.outputs - p.l;
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int x = 0; x < 2; x++) {
        const int n = i * 8 + lane % 4 * 2 + x;
        if (n < count) to[places[n] * stride] = sums.at(i, half * 2 + x) + bias.of[half];
      }
  }
}

}  // namespace

// z, a = split(skip x + out silu(hidden x + bias_hidden) + bias_out) for every query vector x, RoPE undone: see RouterWeights
// and Rotation in backends/base.py. Position of query i of q: next_position - q + i; its angles are float32(position) *
// inv_freq rounded to float32, or come as cosine and sine.
//
// Weights, queries and hidden units are fp16 (clamped to its range), sums float32. Weights lie as the matrix instruction wants
// them: (16-row tile, 32-column unit, fragment of 16 columns, lane, 8 values), so that a lane reads 16 bytes at a time.
//
// Grid (x, h), any x >= 1: block x takes output tiles x * SAAP_WARPS + warp, and every gridDim.x * SAAP_WARPS-th after. Block:
// 32 * SAAP_WARPS threads. Each block computes the hidden units anew: they cost less than handing them over.
// Shared memory: SAAP_WARPS * SAAP_RING KiB + 8 * SAAP_TILES * (64 (D + U) + 20) bytes.
// Weights are read once for every 8 * SAAP_TILES query vectors. Preconditions: b * h * j < 2^31, d <= 32 D.
// Deterministic.
extern "C" __global__ void __launch_bounds__(kThreads, 1) saap_route(const __grid_constant__ RouteParams p) {
  SAAP_SHARED(char, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y;
  char* rows = shared + kWarps * kRing * kUnit;
  int* places = reinterpret_cast<int*>(rows + kVectors * kRow);
  const int vectors = p.b * p.j, first_tile = blockIdx.x * kWarps + warp, tile_step = gridDim.x * kWarps;

  Feed feed;
  feed.hidden = reinterpret_cast<const char*>(p.hidden) + static_cast<i64>(head) * kHiddenTiles * kD * kUnit + lane * 16;
  feed.out = reinterpret_cast<const char*>(p.out) + static_cast<i64>(head) * p.out_tiles * kK * kUnit + lane * 16;
  feed.ring = shared + warp * kRing * kUnit + lane * 16;
  feed.warp = warp, feed.first = first_tile, feed.step = tile_step, feed.out_tiles = p.out_tiles;
  feed.rounds = (vectors + kVectors - 1) / kVectors;
  feed.start();
  // Read before they are needed, as are those of later tiles.
  const float *bias_hidden = p.bias_hidden + head * 32 * kU, *bias_out = p.bias_out + static_cast<i64>(head) * p.out_tiles * 16;
  Bias unit_bias, out_bias;
  unit_bias.read(bias_hidden, warp, kHiddenTiles);
  out_bias.read(bias_out, first_tile, p.out_tiles);

  for (int first = 0; first < vectors; first += kVectors) {
    const int count = vectors - first < kVectors ? vectors - first : kVectors, tiles = (count + 7) / 8;
    if (first > 0) __syncthreads();  // the rows are in use until all warps are done
    fill_rows(p, rows, places, head, first, count);
    __syncthreads();
    Sums sums;
#pragma unroll 1
    for (int tile = warp; tile < kHiddenTiles; tile += kWarps) {
      if (tile != warp || first > 0) unit_bias.read(bias_hidden, tile, kHiddenTiles);
      sums.clear();
      sums.add(feed, rows, 0, kD, tiles);
      write_units(sums, unit_bias, rows, tile, tiles);
    }
    // The part that needs no hidden units, before waiting for them.
    sums.clear();
    if (first_tile < p.out_tiles) sums.add(feed, rows, 0, kD, tiles);
    if (kU > 0) __syncthreads();
#pragma unroll 1
    for (int tile = first_tile; tile < p.out_tiles; tile += tile_step) {
      if (tile != first_tile || first > 0) out_bias.read(bias_out, tile, p.out_tiles);
      if (tile != first_tile) {
        sums.clear();
        sums.add(feed, rows, 0, kD, tiles);
      }
      sums.add(feed, rows, kD, kU, tiles);
      write_tile(p, sums, out_bias, places, tile, count);
    }
  }
  cp_async_wait<0>();
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_route() { return sizeof(RouteParams); }
#endif
