// The query router: from queries to a score for every list, all query vectors of a batch against each weight once.
#include "prims.cuh"

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
constexpr int kUnit = 1024;               // bytes: two fragments of 16 x 16 weights
constexpr int kRow = 16 * (4 * kK + 1);   // bytes of a query vector and its hidden units; the odd piece spreads rows over banks
constexpr int kChains = kTiles == 1 ? 2 : 1;  // independent sums, where a single column would wait for each product
constexpr int kHeads = 4;                 // query vectors of one position that a thread rotates at a time
constexpr int kNextPosition = 4, kMetaWords = 8;
constexpr float kLog2E = 1.44269504f, kMostF16 = 65504.f;

// Into the range of fp16; NaN stays.
__device__ __forceinline__ float clamp_f16(float x) { return x > kMostF16 ? kMostF16 : x < -kMostF16 ? -kMostF16 : x; }

// A division would be a call and its own registers; this is far more exact than the fp16 that the result becomes.
__device__ __forceinline__ float silu(float x) { return x * exp2_fast(-log2_fast(1.f + exp2_fast(-kLog2E * x))); }

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

// Query vector `n` of a head, counted by position first: n = (sequence * q + query) * g + head of the group.
__device__ __forceinline__ int row_of(const RouteParams& p, int n, int head) {
  const int g = p.j / p.q, position = n / g;
  return ((position / p.q) * p.h + head) * p.j + (n % g) * p.q + position % p.q;
}

// Query vectors first, first + 1, ... of a head with RoPE undone, in fp16, one a row; zeros behind them and behind d.
__device__ __forceinline__ void fill_rows(const RouteParams& p, char* rows, int* places, int head, int first, int count) {
  const int g = p.j / p.q, blocks = (g + kHeads - 1) / kHeads;
  const int position0 = first / g, positions = (first + count - 1) / g - position0 + 1;
  auto put = [&](int vector, int dim, float x) {
    *reinterpret_cast<u16*>(rows + vector * kRow + dim * 2) = narrow<kF16>(clamp_f16(x));
  };
  for (int item = threadIdx.x; item < positions * blocks * p.pairs; item += kThreads) {
    const int pair = item % p.pairs, rest = item / p.pairs, position = position0 + rest / blocks;
    const int from = position * g + rest % blocks * kHeads;  // the vectors of this thread: kHeads, within position and batch
    const int stop = from + kHeads < (position + 1) * g ? from + kHeads : (position + 1) * g;
    const int x_dim = p.interleaved ? 2 * pair : pair, y_dim = p.interleaved ? 2 * pair + 1 : pair + p.pairs;
    float x[kHeads], y[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; i++) {
      const int n = from + i;
      const bool mine = n >= first && n < first + count && n < stop;
      const i64 at = mine ? static_cast<i64>(row_of(p, n, head)) * p.d : 0;
      x[i] = mine ? load<SAAP_DTYPE>(p.queries, at + x_dim) : 0.f;
      y[i] = mine ? load<SAAP_DTYPE>(p.queries, at + y_dim) : 0.f;
    }
    float sine, cosine;
    if (p.inv_freq) {
      const int sequence = position / p.q, where = p.meta[sequence * kMetaWords + kNextPosition] - p.q + position % p.q;
      // The product is rounded to float32, as models do; from there on the angle is exact.
      const float angle = static_cast<float>(where) * p.inv_freq[pair];
      sinpi_cospi(static_cast<double>(angle) * 0.31830988618379067154, &sine, &cosine);
    } else {
      const i64 at = static_cast<i64>(position) * p.pairs + pair;
      sine = p.sine[at], cosine = p.cosine[at];
    }
#pragma unroll
    for (int i = 0; i < kHeads; i++) {
      const int n = from + i;
      if (n < first || n >= first + count || n >= stop) continue;
      put(n - first, x_dim, (x[i] * cosine + y[i] * sine) * p.scale);
      put(n - first, y_dim, (y[i] * cosine - x[i] * sine) * p.scale);
    }
  }
  const int plain = 32 * kD - 2 * p.pairs;  // dims that are not rotated, and zeros up to a whole unit
  for (int item = threadIdx.x; item < count * plain; item += kThreads) {
    const int vector = item / plain, dim = 2 * p.pairs + item % plain;
    put(vector, dim, dim < p.d ? load<SAAP_DTYPE>(p.queries, static_cast<i64>(row_of(p, first + vector, head)) * p.d + dim) : 0.f);
  }
  // Vectors that are not there fill the last column; their hidden units come out finite by themselves.
  const int padding = (8 - count % 8) % 8;
  for (int item = threadIdx.x; item < padding * 16 * kD; item += kThreads)
    *reinterpret_cast<u32*>(rows + (count + item / (16 * kD)) * kRow + item % (16 * kD) * 4) = 0;
  for (int n = threadIdx.x; n < count; n += kThreads) places[n] = row_of(p, first + n, head);
}

// Writes one tile of outputs. An output is a score of a list, or one of the distance term and c.
__device__ __forceinline__ void write_tile(const RouteParams& p, const Sums& sums, const int* places, int head, int tile, int count) {
  const int lane = threadIdx.x % 32;
  const float* bias = p.bias_out + static_cast<i64>(head) * p.out_tiles * 16;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int output = tile * 16 + half * 8 + lane / 4;
    if (output >= p.outputs) continue;
    const float add = bias[output];
    const bool list = output < p.l;
    float* to = list ? p.z + output : p.a + (output - p.l);
    const i64 stride = list ? p.l : p.outputs - p.l;
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int x = 0; x < 2; x++) {
        const int n = i * 8 + lane % 4 * 2 + x;
        if (n < count) to[places[n] * stride] = sums.at(i, half * 2 + x) + add;
      }
  }
}

}  // namespace

// z, a = split(skip x + out silu(hidden x + bias_hidden) + bias_out) for every query vector x, RoPE undone: see RouterWeights and
// Rotation in backends/base.py. Position of query i of q: next_position - q + i; its angles are float32(position) * inv_freq
// rounded to float32, or come as cosine and sine.
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

  for (int first = 0; first < vectors; first += kVectors) {
    const int count = vectors - first < kVectors ? vectors - first : kVectors, tiles = (count + 7) / 8;
    if (first > 0) __syncthreads();  // the rows are in use until all warps are done
    fill_rows(p, rows, places, head, first, count);
    __syncthreads();
    Sums sums;
    for (int unit = warp; unit < kHiddenTiles; unit += kWarps) {
      sums.clear();
      sums.add(feed, rows, 0, kD, tiles);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = unit * 16 + half * 8 + lane / 4;
        const float bias = p.bias_hidden[head * 32 * kU + row];
#pragma unroll
        for (int i = 0; i < kTiles; i++)
#pragma unroll
          for (int x = 0; x < 2; x++)
            if (i < tiles)
              *reinterpret_cast<u16*>(rows + (i * 8 + lane % 4 * 2 + x) * kRow + (32 * kD + row) * 2) =
                  narrow<kF16>(clamp_f16(silu(sums.at(i, half * 2 + x) + bias)));
      }
    }
    // The part that needs no hidden units, before waiting for them.
    sums.clear();
    if (first_tile < p.out_tiles) sums.add(feed, rows, 0, kD, tiles);
    if (kU > 0) __syncthreads();
    for (int tile = first_tile; tile < p.out_tiles; tile += tile_step) {
      if (tile != first_tile) {
        sums.clear();
        sums.add(feed, rows, 0, kD, tiles);
      }
      sums.add(feed, rows, kD, kU, tiles);
      write_tile(p, sums, places, head, tile, count);
    }
  }
  cp_async_wait<0>();
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_route() { return sizeof(RouteParams); }
#endif
