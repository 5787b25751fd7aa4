// From queries to the runs to read, in one launch: a cluster of blocks per (sequence, KV head) evaluates the router and selects.
//
// Does what route.cu and select.cu do one after the other, for at most SAAP_COLUMNS query vectors of a KV head, a router that
// counts lists, and budgets in rows. A block has some of the lists: it computes their scores, weighs their runs, and writes those
// that are read. Blocks meet through each other's shared memory: the sums of the softmax, histograms of the weights, the last few
// candidates, the numbers of rows and runs. What all of them need each works out for itself: that takes no further meeting.
#include "route_units.cuh"
#include "select_params.cuh"

#ifndef SAAP_DTYPE
#define SAAP_DTYPE kBF16  // of the queries
#endif
#ifndef SAAP_D32
#define SAAP_D32 4  // d, rounded up to units of 32
#endif
#ifndef SAAP_U32
#define SAAP_U32 2  // u, likewise; 0: a linear router
#endif
#ifndef SAAP_CLUSTER
#define SAAP_CLUSTER 8  // blocks of a cluster, a power of two
#endif
#ifndef SAAP_CLOCK
#define SAAP_CLOCK 0  // 1: the first thread of each block notes the time at each stage
#endif
#ifndef SAAP_SAMPLED
#define SAAP_SAMPLED 0  // 1: a part of each budget is spent on a sample of what the rest leaves; without it nothing of it is compiled
#endif

struct RouteSelectParams {
  const void* queries;       // dtype SAAP_DTYPE (b, h, j, d)
  const u16* hidden;         // the weights as in route.cu, aligned to 16 bytes
  const float* bias_hidden;  // (h, 32 U)
  const u16* out;            // (h, out_tiles, D + U, 2, 32, 8)
  const float* bias_out;     // (h, 16 out_tiles)
  const float* inv_freq;     // (pairs), or null
  const float* cosine;       // (b * q, pairs), where inv_freq is null and pairs > 0
  const float* sine;         // (b * q, pairs), likewise
  const int* meta;           // (b, 8)
  const int* tables;         // (b, h, S, l + 1)
  const float* centres;      // (b, S)
  const int* budgets;        // (b, h) most rows
  const float* unread_mass;         // (h) attention per query vector that may stay unread, or null
  int2* runs;                // out (b, h, most_runs, 2): the row behind a run, and the rows in it and in those before it
  int* run_counts;           // out (b, h) runs of every pair; what is behind them is left as it is
  int* counts;               // out (b, h) rows in them
  int* tickets;              // out (num_tickets): zeros, for the launch that follows; null for none
  i64* clocks;               // out (blocks, 16) cycles since the start, if SAAP_CLOCK
  float scale;               // of rotated dims, see Rotation in backends/base.py
  int b, h, j, q, d;         // j = g * q <= SAAP_COLUMNS
  int pairs, interleaved;    // rotated pairs: r / 2 <= d / 2
  int l, outputs, out_tiles;
  int segments, first_knot;  // S
  int t_cap, most_runs;      // most_runs: S * l, and one more with samples
  int num_tickets;
  int early;                 // whether all that the host publishes is complete, whatever launches have not ended yet
#if SAAP_SAMPLED
  const int* sampled;        // (b, h) rows of the budget that are sampled
  const int* exponents;      // (h) quarters, of the weight of a run in the probability of its rows
  const float* caps;         // (h) nats
  int4* weights;             // out (b, h, most_runs): of each run rows before it, probability, offset, bias, as the scan's Weight;
                             // runs then have the sum of first row and rows in place of the row behind
#endif
};

namespace {

constexpr int kD = SAAP_D32, kU = SAAP_U32, kK = kD + kU, kHiddenTiles = 2 * kU, kCluster = SAAP_CLUSTER;
constexpr int kRow = 16 * (4 * kK + 1);          // bytes of a query vector and its hidden units; the odd piece spreads rows over banks
constexpr int kParts = kD > 1 ? 2 : 1;           // parts of a sum of products over the dims of the query, and over hidden units
constexpr int kCoarse = kBins / 32;              // bins of 32 bins
constexpr int kKeyShift = 17;                    // of the first histogram: bins of 1.6 %
constexpr int kFirstBin = (130 << 6) + 63 - (kBins - 1);  // of weights from 2^-28 to 2^4; smaller ones are in the lowest bin
constexpr int kMetaWords = 8;  // of which 3 are segments, 4 the next position
static_assert(kColumns <= 8 && kThreads >= 8 * kCluster && kCoarse == 64 && !SAAP_LISTS && !SAAP_FAR, "no such configuration");

#if SAAP_SAMPLED
// Probabilities are whole parts of kOne: reference.inclusion has the rules, and these numbers.
constexpr u32 kOne = 1u << 20, kSampleOffset = 0x5a5a5;
constexpr int kSampleShift = 20, kMostSteps = 32 * 21;
__constant__ const u32 kPowers[32] = {
    1048576, 1071537, 1095000, 1118978, 1143480, 1168519, 1194106, 1220254,
    1246974, 1274279, 1302182, 1330696, 1359835, 1389611, 1420040, 1451135,
    1482910, 1515382, 1548564, 1582474, 1617125, 1652536, 1688722, 1725700,
    1763488, 1802103, 1841564, 1881889, 1923097, 1965207, 2008240, 2052214,
};

// 2^(-steps / 32) in parts of kOne.
__device__ __forceinline__ u32 power_of(int steps) { return steps < kMostSteps ? kPowers[-steps & 31] >> ((steps + 31) / 32) : 0; }
#endif

// What blocks read of each other's shared memory, and write to it, and what all threads of a block share.
struct Shared {
  Mass mass[kCluster][kColumns];   // of the lists of every block
  Mass partial[kWarps][kColumns];  // of the warps of this one
  float top[kColumns], factor[kColumns], share[kColumns];
  int far;                         // whether runs are so far apart that each needs an exponential of its own
  Measure written[kCluster];       // rows and runs that blocks write
  Measure before, scan[kWarps];    // before: the measure of all bins above the one that holds the end
  Cut cut;
  int bin;
  u32 limit;                       // of mass
  u32 found;
  float most_share;
  Candidate mine[kFew], few[kFew];          // of this block, and of all
  Measure bins[kBins], coarse[kCoarse];     // of this block's runs
};

// Where things lie behind `Shared`, in bytes; the host computes the same.
struct Sizes {
  int tiles;         // of outputs that a block has for its lists
  int more_tiles;    // of the distance term and c, which every block computes
  int lists;         // 16 * tiles
  __device__ __forceinline__ explicit Sizes(const RouteSelectParams& p)
      : tiles(((p.l + 15) / 16 + kCluster - 1) / kCluster), more_tiles((p.outputs - 1) / 16 - p.l / 16 + 1), lists(16 * tiles) {}
};

// An item is a run of one of the block's lists. Larger is better: the weight, then newer segments, then lower lists.
__device__ __forceinline__ u64 order_of(u32 key, u32 place) { return static_cast<u64>(key) << 32 | (0xffffffffu - place); }

__device__ __forceinline__ int bin_of(u32 key) { return clamp(static_cast<int>(key >> kKeyShift) - kFirstBin, 0, kBins - 1); }

// The products of a tile of weights with the vectors over `units` units from `unit`, as 16 x 8 floats at `to`.
__device__ __forceinline__ void multiply(const char* weights, const char* rows, int unit, int units, int column, float* to) {
  const int lane = threadIdx.x % 32;
  float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
  const char* from = weights + unit * kUnit + lane * 16;
  const char* mine = rows + lane % 8 * kRow + (4 * (column + unit) + lane / 8) * 16;
#pragma unroll 2
  for (int k = 0; k < units; k++) {
    const uint4 a = *reinterpret_cast<const uint4*>(from + k * kUnit), c = *reinterpret_cast<const uint4*>(from + k * kUnit + kUnit / 2);
    const u32 low[4] = {a.x, a.y, a.z, a.w}, high[4] = {c.x, c.y, c.z, c.w};
    u32 x[4];
    ldmatrix4(x, mine + k * 64);
    mma_16816<kF16>(even, low, x[0], x[1]);
    mma_16816<kF16>(odd, high, x[2], x[3]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) to[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = even[i] + odd[i];
}

// The j query vectors with RoPE undone in fp16, one a row; zeros behind them and behind d.
__device__ __forceinline__ void fill_rows(
    const RouteSelectParams& p, int next, const float* inv_freq, char* rows, int head, int sequence) {
  const i64 base = (static_cast<i64>(sequence) * p.h + head) * p.j * p.d;
  auto put = [&](int vector, int dim, float x) {
    *reinterpret_cast<u16*>(rows + vector * kRow + dim * 2) = narrow<kF16>(clamp_f16(x));
  };
#pragma unroll 1
  for (int item = threadIdx.x; item < p.j * p.pairs; item += kThreads) {
    const int vector = static_cast<int>(static_cast<u32>(item) / static_cast<u32>(p.pairs)), pair = item - vector * p.pairs;
    const int query = p.q == 1 ? 0 : vector % p.q;
    const int x_dim = p.interleaved ? 2 * pair : pair, y_dim = p.interleaved ? 2 * pair + 1 : pair + p.pairs;
    const float x = load<SAAP_DTYPE>(p.queries, base + vector * p.d + x_dim);
    const float y = load<SAAP_DTYPE>(p.queries, base + vector * p.d + y_dim);
    float sine, cosine;
    if (p.inv_freq) {
      // The product is rounded to float32, as models do; from there on the angle is exact.
      const float angle = static_cast<float>(next - p.q + query) * inv_freq[pair];
      sinpi_cospi(static_cast<double>(angle) * 0.31830988618379067154, &sine, &cosine);
    } else {
      const i64 at = static_cast<i64>(sequence * p.q + query) * p.pairs + pair;
      sine = p.sine[at], cosine = p.cosine[at];
    }
    put(vector, x_dim, (x * cosine + y * sine) * p.scale);
    put(vector, y_dim, (y * cosine - x * sine) * p.scale);
  }
  const int plain = 32 * kD - 2 * p.pairs;  // dims that are not rotated, and zeros up to a whole unit
#pragma unroll 1
  for (int item = threadIdx.x; item < p.j * plain; item += kThreads) {
    const int vector = item / plain, dim = 2 * p.pairs + item - vector * plain;
    put(vector, dim, dim < p.d ? load<SAAP_DTYPE>(p.queries, base + vector * p.d + dim) : 0.f);
  }
#pragma unroll 1
  for (int item = threadIdx.x; item < (8 - p.j) * 16 * kD; item += kThreads)
    *reinterpret_cast<u32*>(rows + (p.j + item / (16 * kD)) * kRow + item % (16 * kD) * 4) = 0;
}

// Starts to copy bytes, a multiple of 16.
__device__ __forceinline__ void fetch(char* to, const char* from, int bytes) {
#pragma unroll 1
  for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) cp_async16(to + i, from + i, true);
}

// The same of a few words, by one warp; the loops of all those that are small are short and stand side by side.
__device__ __forceinline__ void fetch_words(int warp, void* to, const void* from, int words) {
  if (static_cast<int>(threadIdx.x) / 32 != warp % kWarps) return;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < words; i += 32) cp_async4(static_cast<u32*>(to) + i, static_cast<const u32*>(from) + i);
}

// One cluster's selection: where it reads, where its shared memory is.
struct Block {
  static constexpr int kMostKnots = 32;
  const RouteSelectParams& p;
  const Sizes size;
  Shared* shared;
  int head, sequence, rank;
  int first, lists;  // the block's lists: [first, first + lists)
  int knots;
  int segments = 0, next = 0;  // of the sequence, and the position of the token that comes next
  i64 began = 0;     // the clock, if SAAP_CLOCK
  char* weights;     // hidden (kHiddenTiles, kD, kUnit), out (tiles + more_tiles, kK, kUnit)
  char* rows;        // (8, kRow)
  float* products;   // (tiles of weights, kParts, 16, 8), then (tiles of outputs, kParts, 16, 8)
  float* z;          // (lists, kColumns), times log2 e
  float* a;          // (knots + 1, kColumns)
  float* bend;       // (S, kColumns) exp of the distance terms, relative to the largest; wide: themselves, times log2 e
  int* table;        // (S, lists + 1) where runs start
  u32* keys;         // (S, lists) bits of the weights
  float* centres;    // (S); later places on the knots
  float* inv_freq;   // (pairs), if there are any
  float* biases;     // of hidden units (32 U), of outputs (tiles + more_tiles, 16)
#if SAAP_SAMPLED
  u32* rest;         // (kBins) rows of this block that the cut leaves, by the bin of their weight
  u32* probability;  // (kBins) of the rows of each bin that has some
  u32* sums;         // (S) of the probabilities of this block's rows; modulo 2^32, as all that comes of them
  u32* places;       // (S) of this block's first run of a segment, among the probabilities of all rows in the order of memory
#endif

  __device__ __forceinline__ Block(const RouteSelectParams& p, char* memory)
      : p(p), size(p), shared(reinterpret_cast<Shared*>(memory)), head(static_cast<int>(blockIdx.x) / kCluster),
        sequence(static_cast<int>(blockIdx.y)), rank(cluster_rank()), first(rank * size.lists),
        lists(clamp(p.l - first, 0, size.lists)), knots(p.outputs - p.l - 1) {
#if SAAP_CLOCK
    began = clock64();
#endif
    const int tiles = size.tiles + size.more_tiles;
    char* at = memory + (sizeof(Shared) + 127) / 128 * 128;
    weights = at, at += (kHiddenTiles * kD + tiles * kK) * kUnit;
    rows = at, at += 8 * kRow;
    products = reinterpret_cast<float*>(at), at += (kHiddenTiles + 2 * tiles) * kParts * 512;
#if SAAP_SAMPLED
    rest = reinterpret_cast<u32*>(at), at += kBins * 4;
    probability = reinterpret_cast<u32*>(at), at += kBins * 4;
    sums = reinterpret_cast<u32*>(at), places = sums + p.segments, at += (2 * p.segments + 3) / 4 * 16;
#endif
    z = reinterpret_cast<float*>(at), at += size.lists * kColumns * 4;
    a = reinterpret_cast<float*>(at), at += (kMostKnots + 1) * kColumns * 4;
    bend = reinterpret_cast<float*>(at), at += p.segments * kColumns * 4;
    table = reinterpret_cast<int*>(at), at += p.segments * (size.lists + 1) * 4;
    keys = reinterpret_cast<u32*>(at), at += p.segments * size.lists * 4;
    centres = reinterpret_cast<float*>(at), at += p.segments * 4;
    inv_freq = reinterpret_cast<float*>(at), at += 16 * kD * 4;
    biases = reinterpret_cast<float*>(memory + (at - memory + 15) / 16 * 16);
  }

  __device__ __forceinline__ void note(int stage) const {
#if SAAP_CLOCK
    if (threadIdx.x == 0) p.clocks[(static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x) * 16 + stage] = clock64() - began;
#endif
  }

  __device__ __forceinline__ char* out_weights() const { return weights + kHiddenTiles * kD * kUnit; }

  // What the launch in front has counted: past L1, where a line of before it may lie.
  __device__ __forceinline__ void read_meta() {
    const int* meta = p.meta + sequence * kMetaWords;
    const float4 low = ld_l2_16(meta), high = ld_l2_16(meta + 4);
    segments = clamp(static_cast<int>(__float_as_uint(low.w)), 0, p.segments), next = static_cast<int>(__float_as_uint(high.x));
  }

  // What no other launch of a step writes: it may be read before they are done.
  __device__ __forceinline__ void prefetch() const {
    const char* hidden = reinterpret_cast<const char*>(p.hidden) + static_cast<i64>(head) * kHiddenTiles * kD * kUnit;
    const char* out = reinterpret_cast<const char*>(p.out) + static_cast<i64>(head) * p.out_tiles * kK * kUnit;
    const int tile = rank * size.tiles, tiles = clamp(p.out_tiles - tile, 0, size.tiles), more = p.l / 16;
    const float* bias = p.bias_out + static_cast<i64>(head) * p.out_tiles * 16;
    fetch_words(0, biases, p.bias_hidden + head * 32 * kU, 32 * kU);
    fetch_words(1, biases + 32 * kU, bias + tile * 16, tiles * 16);
    fetch_words(2, biases + 32 * kU + size.tiles * 16, bias + more * 16, size.more_tiles * 16);
    if (p.inv_freq) fetch_words(3, inv_freq, p.inv_freq, p.pairs);
    fetch_words(4, centres, p.centres + static_cast<i64>(sequence) * p.segments, p.segments);
    const int* from = p.tables + (static_cast<i64>(sequence) * p.h + head) * p.segments * (p.l + 1) + first;
    const int width = lists ? lists + 1 : 0;
#pragma unroll 1
    for (int s = threadIdx.x / 32; s < p.segments; s += kWarps)
      fetch_words(threadIdx.x / 32, table + s * (size.lists + 1), from + s * (p.l + 1), width);
    cp_async_commit();
    // The weights last: nobody waits for them before `route` multiplies.
    fetch(weights, hidden, kHiddenTiles * kD * kUnit);
    fetch(out_weights(), out + static_cast<i64>(tile) * kK * kUnit, tiles * kK * kUnit);
    fetch(out_weights() + size.tiles * kK * kUnit, out + static_cast<i64>(more) * kK * kUnit, size.more_tiles * kK * kUnit);
    cp_async_commit();
  }

  __device__ __forceinline__ void clear_bins() const {
    if (threadIdx.x == 0) shared->found = 0, shared->far = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared->bins[i] = {0, 0};
    if (threadIdx.x < kCoarse) shared->coarse[threadIdx.x] = {0, 0};
#if SAAP_SAMPLED
#pragma unroll 1
    for (int i = threadIdx.x; i < kBins; i += kThreads) rest[i] = 0;
#endif
  }

  // Fills z and a.
  __device__ __forceinline__ void route() const {
    const int warp = threadIdx.x / 32, tiles = size.tiles + size.more_tiles;
    fill_rows(p, next, inv_freq, rows, head, sequence);
    find_places();
    cp_async_wait<0>();
    __syncthreads();
    note(1);
    // Hidden units, and what outputs have of the query itself.
#pragma unroll 1
    for (int item = warp; item < (kHiddenTiles + tiles) * kParts; item += kWarps) {
      const int tile = item / kParts, part = item % kParts, from = part * kD / kParts, to = (part + 1) * kD / kParts;
      const char* of = tile < kHiddenTiles ? weights + tile * kD * kUnit : out_weights() + (tile - kHiddenTiles) * kK * kUnit;
      multiply(of, rows, from, to - from, 0, products + item * 128);
    }
    __syncthreads();
    float* more = products + (kHiddenTiles + tiles) * kParts * 128;
    if (kU > 0) {
#pragma unroll 1
      for (int i = threadIdx.x; i < 32 * kU * kColumns; i += kThreads) {
        const int unit = i / kColumns, vector = i % kColumns;
        const float* from = products + unit / 16 * kParts * 128 + unit % 16 * 8 + vector;
        float sum = from[0];
        if (kParts > 1) sum += from[128];
        *reinterpret_cast<u16*>(rows + vector * kRow + (32 * kD + unit) * 2) = narrow<kF16>(clamp_f16(silu(sum + biases[unit])));
      }
      __syncthreads();
#pragma unroll 1
      for (int item = warp; item < tiles * kParts; item += kWarps) {
        const int tile = item / kParts, part = item % kParts, from = part * kU / kParts, to = (part + 1) * kU / kParts;
        multiply(out_weights() + (tile * kK + kD) * kUnit, rows, from, to - from, kD, more + item * 128);
      }
      __syncthreads();
    }
    const float* bias = biases + 32 * kU;
#pragma unroll 1
    for (int i = threadIdx.x; i < (lists + knots + 1) * kColumns; i += kThreads) {
      const int output = i / kColumns, vector = i % kColumns, k = output - lists + p.l % 16;  // k: past the first of more_tiles
      const int row = output < lists ? output : size.lists + k, tile = row / 16;
      const float* from = products + (kHiddenTiles + tile) * kParts * 128 + row % 16 * 8 + vector;
      float sum = from[0];
      if (kParts > 1) sum += from[128];
      if (kU > 0) {
        from = more + tile * kParts * 128 + row % 16 * 8 + vector;
        sum += from[0];
        if (kParts > 1) sum += from[128];
      }
      sum += bias[row];
      if (output < lists) z[i] = kLog2E * sum;
      else a[i - lists * kColumns] = sum;
    }
    __syncthreads();
    note(2);
  }

  // Where each segment lies on the knots, as QueryRouter.knots has it, in place of its centre. The last threads are idle here.
  __device__ __forceinline__ void find_places() const {
#pragma unroll 1
    for (int s = kThreads - 1 - static_cast<int>(threadIdx.x); s < segments; s += kThreads) {
      const float distance = static_cast<float>(static_cast<double>(next) - 1.0 - static_cast<double>(centres[s]));
      const u32 bits = __float_as_uint(distance > 1.f ? distance : 1.f);
      // The exponent apart, so that powers of two are whole and what is rounded is the fraction.
      const float octaves = static_cast<float>(static_cast<int>(bits >> 23) - 127 - p.first_knot);
      const float place = octaves + log2f(__uint_as_float((bits & 0x007fffff) | 0x3f800000));
      centres[s] = fminf(fmaxf(place, 0.f), static_cast<float>(knots > 0 ? knots - 1 : 0));
    }
  }

  // What each vector counts (the sigmoid of c, relative to the largest) and the distance terms; a warp has a vector at a time.
  __device__ __forceinline__ void find_bends(bool wide) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int vector = threadIdx.x / 32; vector < kColumns; vector += kWarps) {
      const bool present = vector < p.j;
      const float c = lane < p.j ? a[knots * kColumns + lane] : -INFINITY;
      float best = c;
#pragma unroll
      for (int step = 1; step < 8; step *= 2) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, step));
      // sigmoid(c) = exp(min(c, 0)) / (1 + exp(-|c|)): the ratio of two of them is safe however small both are
      best = __shfl_sync(kAllLanes, best, 0);
      const float mine = __shfl_sync(kAllLanes, c, vector);
      const float base = fminf(best, 0.f), one = 1.f + weigh(-fabsf(best));
      const float relative = weigh(fminf(mine, 0.f) - base) * (one / (1.f + weigh(-fabsf(mine))));
      const float knot = present && lane < knots ? a[lane * kColumns + vector] : 0.f;
      bool odd = false;
      float top = -INFINITY;
#pragma unroll 1
      for (int from = 0; from < segments; from += 32) {
        const int s = from + lane;
        const float at = s < segments ? centres[s] : 0.f;
        const int low = static_cast<int>(at);
        const float y0 = __shfl_sync(kAllLanes, knot, low), y1 = __shfl_sync(kAllLanes, knot, low + 1 < knots ? low + 1 : low);
        const float y = kLog2E * (y0 + (at - static_cast<float>(low)) * (y1 - y0));
        if (s >= segments) continue;
        bend[s * kColumns + vector] = y;
        odd |= !(y < INFINITY);
        top = fmaxf(top, y);
      }
      if (!wide) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
#pragma unroll 1
        for (int s = lane; s < segments; s += 32) {
          const float y = bend[s * kColumns + vector];
          bend[s * kColumns + vector] = y < INFINITY && top > -INFINITY ? exp2_fast(y - top) : 0.f;
        }
      }
      odd = __any_sync(kAllLanes, odd);
      if (lane == 0) shared->share[vector] = present && !odd && mine == mine && relative > 0.f ? relative : 0.f;
      if (lane == 0 && vector == 0) shared->most_share = weigh(base) / one;
    }
    __syncthreads();
  }

  // Vectors of a list or of a segment.
  struct Columns {
    float of[kColumns];
    __device__ __forceinline__ explicit Columns(const float* from) {
#pragma unroll
      for (int k = 0; k < kColumns / 4; k++) {
        const float4 four = reinterpret_cast<const float4*>(from)[k];
        of[4 * k] = four.x, of[4 * k + 1] = four.y, of[4 * k + 2] = four.z, of[4 * k + 3] = four.w;
      }
    }
  };

  __device__ __forceinline__ static int length(const int* x) {
    const int n = static_cast<int>(static_cast<u32>(x[1]) - static_cast<u32>(x[0]));
    return n > 0 ? n : 0;
  }
  __device__ __forceinline__ int length(int s, int list) const { return length(table + s * (size.lists + 1) + list); }

  // Runs as threads share them: lanes have lists, warps have segments. f(s, list).
  template <class F>
  __device__ __forceinline__ void each_run(F f) const {
#pragma unroll 1
    for (int list = threadIdx.x % 32; list < lists; list += 32)
#pragma unroll 1
      for (int s = threadIdx.x / 32; s < segments; s += kWarps) f(s, list);
  }

  // The sums of the softmax over all runs of the cluster: shared->top and shared->factor. False if they are too small to be of
  // use, because the best lists lie in segments of no weight: then again, wide.
  __device__ __forceinline__ bool find_sums(bool wide) const {
    add_up(wide);
    __syncthreads();
    if (threadIdx.x < kCluster * kColumns) {
      const int k = threadIdx.x % kColumns, to = threadIdx.x / kColumns;
      of_block(shared, to)->mass[rank][k] = joined(shared->partial, k);
    }
    cluster_barrier();
    if (const int k = threadIdx.x; k < kColumns) {
      const Mass all = joined(shared->mass, k);
      const float share = shared->share[k];
      shared->top[k] = all.top > -INFINITY ? all.top : 0.f;
      shared->factor[k] = all.sum > 0.f ? share / all.sum : 0.f;
      if (!wide && knots > 0 && share > 0.f && all.sum < kLeastSum) atomicOr(&shared->far, 1);
    }
    __syncthreads();
    return wide || !shared->far;
  }
  // The sums of each warp: shared->partial.
  __device__ __forceinline__ void add_up(bool wide) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Mass mass[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; k++) mass[k] = {-INFINITY, 0.f};
    if (wide) {
      each_run([&](int s, int list) {
        const float n = static_cast<float>(length(s, list));
        if (n > 0.f)
#pragma unroll
          for (int k = 0; k < kColumns; k++) mass[k] = join(mass[k], {z[list * kColumns + k] + bend[s * kColumns + k], n});
      });
    } else {
#pragma unroll 1
      for (int list = lane; list < lists; list += 32) {
        float density[kColumns];
        int tokens = 0;
#pragma unroll
        for (int k = 0; k < kColumns; k++) density[k] = 0.f;
#pragma unroll 1
        for (int s = warp; s < segments; s += kWarps) {
          const Columns x(bend + s * kColumns);
          const int n = length(s, list);
          tokens |= n;
#pragma unroll
          for (int k = 0; k < kColumns; k++) density[k] += static_cast<float>(n) * x.of[k];
        }
        const Columns score(z + list * kColumns);
        if (tokens)
#pragma unroll
          for (int k = 0; k < kColumns; k++) mass[k] = join(mass[k], {score.of[k], density[k]});
      }
    }
    if (warp == 0)
#pragma unroll 1
      for (int list = lane; list < lists; list += 32)
#pragma unroll
        for (int k = 0; k < kColumns; k++)
          if (!(z[list * kColumns + k] < INFINITY)) mass[k].sum = NAN;  // a score that is no number silences its vector
#pragma unroll
    for (int k = 0; k < kColumns; k++) {
      float top = mass[k].top;
#pragma unroll
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
      float sum = mass[k].sum * scaled(mass[k].top, top);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (lane == 0) shared->partial[warp][k] = {top, sum};
    }
  }
  // In the order of the rows.
  template <int n>
  __device__ __forceinline__ static Mass joined(const Mass (&parts)[n][kColumns], int k) {
    float top = -INFINITY, sum = 0.f;
#pragma unroll 4
    for (int i = 0; i < n; i++) top = fmaxf(top, parts[i][k].top);
#pragma unroll 4
    for (int i = 0; i < n; i++) sum += parts[i][k].sum * scaled(parts[i][k].top, top);
    return {top, sum};
  }
  __device__ __forceinline__ static float scaled(float top, float most) {
    return exp2_fast(top - (most > -INFINITY ? most : 0.f));
  }
  __device__ __forceinline__ static Mass join(Mass x, Mass y) {
    const float top = fmaxf(x.top, y.top);
    return {top, x.sum * scaled(x.top, top) + y.sum * scaled(y.top, top)};
  }

  __device__ __forceinline__ u32 place_of(int s, int list) const {
    return static_cast<u32>((segments - 1 - s) * p.l + first + list);
  }
  // A run of n tokens of weight w; units: of mass, of a weight of one.
  __device__ __forceinline__ Measure measure(int n, u32 key, float units) const {
    const float mass = static_cast<float>(n) * __uint_as_float(key);
    if (!p.unread_mass || !(mass > 0.f)) return {static_cast<u32>(n), 0};
    return {static_cast<u32>(n), static_cast<u32>(fminf(fmaxf(mass * units + 0.5f, 1.f), kMassUnits))};
  }
  __device__ __forceinline__ void tally(int bin, Measure x) const {
    atomicAdd(&shared->bins[bin].rows, x.rows);
    atomicAdd(&shared->coarse[bin / 32].rows, x.rows);
    if (x.mass) {
      atomicAdd(&shared->bins[bin].mass, x.mass);
      atomicAdd(&shared->coarse[bin / 32].mass, x.mass);
    }
  }

  // Keys of all runs, tallied by their leading bits. Returns the sum of the shares; units: by what mass is multiplied.
  __device__ __forceinline__ float weigh_runs(bool wide, float& units) const {
    float total = 0.f;
#pragma unroll
    for (int k = 0; k < kColumns; k++) total += shared->factor[k] > 0.f ? shared->share[k] : 0.f;
    units = p.unread_mass && total > 0.f ? kMassUnits / total : 0.f;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int list = lane; list < lists; list += 32) {
      const Columns score(z + list * kColumns);
      float relative[kColumns];
#pragma unroll
      for (int k = 0; k < kColumns; k++) {
        const float factor = shared->factor[k];
        relative[k] = wide ? factor : factor > 0.f ? factor * exp2_fast(score.of[k] - shared->top[k]) : 0.f;
      }
#pragma unroll 1
      for (int s = warp; s < segments; s += kWarps) {
        const int n = length(s, list);
        const Columns x(bend + s * kColumns);
        float w = 0.f;
        if (wide) {
#pragma unroll
          for (int k = 0; k < kColumns; k++)
            if (relative[k] > 0.f) w += relative[k] * exp2_fast(score.of[k] + x.of[k] - shared->top[k]);
        } else {
#pragma unroll
          for (int k = 0; k < kColumns; k++) w += relative[k] * x.of[k];
        }
        const u32 key = n > 0 ? __float_as_uint(fminf(fmaxf(w, 0.f), kMost)) : kNoItem;
        keys[s * size.lists + list] = key;
        if (n > 0) tally(bin_of(key), measure(n, key, units));
      }
    }
    return total;
  }

  // Over the blocks. bins: an array in each of them.
  template <int n>
  __device__ __forceinline__ Measure of_all(Measure (Shared::*bins)[n], int bin) const {
    Measure x[kCluster], sum{0, 0};
#pragma unroll
    for (int i = 0; i < kCluster; i++) x[i] = (of_block(shared, i)->*bins)[bin];
#pragma unroll
    for (int i = 0; i < kCluster; i++) sum = sum + x[i];
    return sum;
  }

  // The bin of the histograms in which the selection ends, and the measure of the bins above it; false if it does not end: then
  // everything is read, or nothing, as shared->cut says. Every block finds the same. limits: less what lies above, afterwards.
  __device__ __forceinline__ bool find_bin(Limits& limits, bool first_round, int& bin) const {
    cluster_barrier();  // all has been tallied
    note(6);
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      // From the highest bin down; a lane has two of the coarse ones.
      const int high = kCoarse - 1 - 2 * lane;
      const Measure one = of_all(&Shared::coarse, high), two = of_all(&Shared::coarse, high - 1);
      const Measure to = inclusive_scan_warp(one + two), all = from_lane(to, 31), middle = to - two, from = middle - one;
      Limits ends = limits;
      if (first_round && ends.spare >= 0) {
        const double spare = ends.spare * all.mass;
        const u32 kept = spare < all.mass ? static_cast<u32>(spare) : all.mass;
        ends.mass = all.mass - kept;
      }
      if (lane == 0) shared->bin = -1;
      __syncwarp();
      if (ends.mass == 0) {  // it holds before the first item
        if (lane == 0) shared->cut = take_nothing();
      } else if (!ends.reached(all)) {
        if (lane == 0) shared->cut = take_all();
      } else {
        const int owner = __ffs(__ballot_sync(kAllLanes, ends.reached(to))) - 1;
        const bool second = !ends.reached(from_lane(middle, owner));
        const int coarse = kCoarse - 1 - 2 * owner - second;
        const Measure above = from_lane(second ? middle : from, owner);
        const Measure fine = of_all(&Shared::bins, coarse * 32 + 31 - lane), below = above + inclusive_scan_warp(fine);
        const int last = __ffs(__ballot_sync(kAllLanes, ends.reached(below))) - 1;
        if (lane == last) shared->bin = coarse * 32 + 31 - lane, shared->before = below - fine;
      }
      if (lane == 0) shared->limit = ends.mass;
    }
    __syncthreads();
    bin = shared->bin;
    if (bin < 0) return false;
    limits.mass = shared->limit;
    if (limits.rows != kNoLimit) limits.rows -= shared->before.rows;
    if (limits.mass != kNoLimit) limits.mass -= shared->before.mass;
    return true;
  }

  // Finds shared->cut, the same in all blocks. Before: keys are tallied. limits.rows > 0.
  __device__ __forceinline__ void find_cut(Limits limits, float units) const {
    u64 low = 0, high = ~0ull;  // the range is [low, high)
    int shift = 32 + kKeyShift;
#pragma unroll 1
    for (bool first = true;; first = false) {
      int bin = 0;
      if (!find_bin(limits, first, bin)) return;
      const int number = first ? bin + kFirstBin : bin;
      const u64 end = low + (static_cast<u64>(number + 1) << shift);
      if (!first || bin) low += static_cast<u64>(number) << shift;
      if (first ? bin < kBins - 1 : end > low && end < high) high = end;
      note(7);
      const u32 lowest = static_cast<u32>(low >> 32), highest = static_cast<u32>(high >> 32);
      auto in_range = [&](int s, int list, u64& offset) {
        const u32 key = keys[s * size.lists + list];
        if (key < lowest || key > highest || key == kNoItem) return false;
        const u64 order = order_of(key, place_of(s, list));
        offset = order - low;
        return order >= low && order < high;
      };
      each_run([&](int s, int list) {
        u64 offset;
        if (!in_range(s, list, offset)) return;
        const u32 key = keys[s * size.lists + list], slot = atomicAdd(&shared->found, 1u);
        if (slot < kFew) shared->mine[slot] = {key, static_cast<int>(place_of(s, list)), measure(length(s, list), key, units)};
      });
      cluster_barrier();
      note(8);
      u32 found[kCluster], all = 0;
#pragma unroll
      for (int i = 0; i < kCluster; i++) found[i] = of_block(shared, i)->found;
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
      for (int i = 0; i < kCluster; i++) all += found[i];
      if (all <= kFew) {
#pragma unroll 1
        for (int block = warp; block < kCluster; block += kWarps) {
          const Shared* other = of_block(shared, block);
          u32 at = 0, count = 0;
#pragma unroll
          for (int i = 0; i < kCluster; i++) {
            if (i < block) at += found[i];
            if (i == block) count = found[i];
          }
          for (u32 i = lane; i < count; i += 32) shared->few[at + i] = other->mine[i];
        }
        __syncthreads();
        rank_candidates(shared->few, static_cast<int>(all), limits, [&](Cut cut) { shared->cut = cut; });
        __syncthreads();
        return;
      }
      // Too many to compare each with each: the same again, with finer bins.
      cluster_barrier();  // the others have read what is cleared now
      clear_bins();
      __syncthreads();
      const int bits = 64 - __clzll(static_cast<i64>(high - low - 1));
      shift = bits > kBinBits ? bits - kBinBits : 0;
      each_run([&](int s, int list) {
        u64 offset;
        if (in_range(s, list, offset))
          tally(static_cast<int>(offset >> shift), measure(length(s, list), keys[s * size.lists + list], units));
      });
    }
  }

  // Rows of a run that are read for certain, its last ones.
  __device__ __forceinline__ u32 read_of(const Cut& cut, u32 key, int s, int list) const {
    if (key < cut.key || key == kNoItem) return 0;
    const u32 n = static_cast<u32>(length(s, list));
    const int place = static_cast<int>(place_of(s, list));
    if (key > cut.key || place < cut.place) return n;
    return place == cut.place ? (cut.rows < n ? cut.rows : n) : 0;
  }

#if SAAP_SAMPLED
  __device__ __forceinline__ u32 sample_bin(u32 key) const {
    return (__float_as_uint(__uint_as_float(key) * shared->most_share) + kSampleOffset) >> kSampleShift;
  }

  // Fills `probability` as reference.inclusion does, in every block: `rows` rows of what the cut leaves.
  __device__ __forceinline__ void find_probabilities(u32 rows, int exponent) const {
    const Cut cut = shared->cut;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    each_run([&](int s, int list) {
      const u32 key = keys[s * size.lists + list];
      if (key == kNoItem) return;
      const u32 left = static_cast<u32>(length(s, list)) - read_of(cut, key, s, list);
      if (left) atomicAdd(&rest[sample_bin(key)], left);
    });
    cluster_barrier();  // all has been tallied, and nobody reads another's bins any more
    // The bins that have rows, from the highest down: each with the rows above it. The last bin has none.
    static_assert(kBins % (4 * kThreads) == 0, "four bins to a thread");
    Measure* const filled = shared->bins;
    Measure before{0, 0};  // bins and rows
#pragma unroll 1
    for (int top = kBins - 1 - 4 * static_cast<int>(threadIdx.x); top >= 0; top -= 4 * kThreads) {
      u32 of[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kCluster; i++) {
        const uint4 x = *reinterpret_cast<const uint4*>(of_block(rest, i) + top - 3);
        of[0] += x.w, of[1] += x.z, of[2] += x.y, of[3] += x.x;
      }
      Measure mine{0, 0}, total;
#pragma unroll
      for (int k = 0; k < 4; k++) mine = mine + Measure{of[k] > 0, of[k]};
      Measure at = before + exclusive_scan(mine, total, shared->scan);
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (of[k]) filled[at.rows] = {static_cast<u32>(top - k), at.mass}, at = at + Measure{1, of[k]};
      before = before + total;
    }
    const int count = static_cast<int>(before.rows);
    if (threadIdx.x == 0) filled[count] = {0, before.mass};
    __syncthreads();
    // The first bin whose rows are not all read for certain. A warp has a bin.
    i64* const totals = reinterpret_cast<i64*>(shared->partial);
    int first = count;
    i64 whole = 1;
#pragma unroll 1
    for (int base = 0; base < count && first == count; base += kWarps) {
      const int mine = base + warp;
      i64 total = 0;
#pragma unroll 1
      for (int k = mine + lane; k < count; k += 32) {
        const u32 power = power_of(exponent * static_cast<int>(filled[mine].rows - filled[k].rows));
        if (!power) break;
        total += static_cast<i64>(power) * (filled[k + 1].mass - filled[k].mass);
      }
      __syncwarp();
#pragma unroll
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      if (lane == 0) totals[warp] = total;
      __syncthreads();
#pragma unroll 1
      for (int w = 0; w < kWarps && base + w < count && first == count; w++)
        if ((static_cast<i64>(rows) - filled[base + w].mass) * kOne < totals[w]) first = base + w, whole = totals[w];
      __syncthreads();
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      u32 each = kOne;
      if (i >= first) {
        const u32 power = power_of(exponent * static_cast<int>(filled[first].rows - filled[i].rows));
        const i64 spent = (static_cast<i64>(rows) - filled[first].mass) * kOne;
        each = power ? static_cast<u32>(static_cast<i64>(power) * spent / whole) : 0;
      }
      probability[filled[i].rows] = each;
    }
    __syncthreads();
  }

  // Writes the block's runs of which something is read: of each the sample of its first rows, then those that are read for certain.
  // Where the sample takes a row follows from the sum of the probabilities of all rows before it, in the order of memory.
  __device__ __forceinline__ void write_samples(float cap) const {
    const Cut cut = shared->cut;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 pair = static_cast<i64>(sequence) * p.h + head;
    const u32 most = static_cast<u32>(p.t_cap), most_runs = static_cast<u32>(p.most_runs);
    Measure start{0, 0};
    // Sums of probabilities; then how much there is to write; then it is written.
#pragma unroll 1
    for (int stage = 0; stage < 3; stage++) {
      Measure at = start;
#pragma unroll 1
      for (int s = warp; s < segments; s += kWarps) {
        u32 place = stage ? places[s] : 0;
#pragma unroll 1
        for (int base = 0; base < lists; base += 32) {
          const int list = base + lane;
          u32 read = 0, left = 0, each = 0;
          if (list < lists) {
            const u32 key = keys[s * size.lists + list];
            if (key != kNoItem) {
              read = read_of(cut, key, s, list);
              left = static_cast<u32>(length(s, list)) - read;
              if (left) each = probability[sample_bin(key)];
            }
          }
          const u32 mine = each * left, end = place + inclusive_scan_warp(mine), offset = (end - mine) % kOne;
          place = from_lane(end, 31);
          if (stage == 0) continue;
          const u32 marks = static_cast<u32>((offset + static_cast<u64>(each) * left) / kOne);
          if (stage == 2) {
            const int begin = list < lists ? table[s * (size.lists + 1) + list] : 0;
            auto put = [&](Measure to, u32 row, u32 rows, u32 of, float bias) {
              if (to.mass >= most_runs) return;
              const i64 i = pair * p.most_runs + to.mass;
              p.runs[i] = make_int2(static_cast<int>(row + rows), static_cast<int>(min(to.rows + rows, most)));
              const int bits = static_cast<int>(__float_as_uint(bias));
              p.weights[i] = make_int4(static_cast<int>(to.rows), static_cast<int>(of), static_cast<int>(offset), bits);
            };
            if (marks) {
              const float bias = static_cast<float>(log(static_cast<double>(kOne) / static_cast<double>(each)));
              put(at, static_cast<u32>(begin), marks, each, fminf(bias, cap));
            }
            if (read) put(at + Measure{marks, marks > 0}, static_cast<u32>(begin) + left, read, kOne, 0.f);
          }
          at = at + Measure{marks + read, static_cast<u32>((marks > 0) + (read > 0))};
        }
        if (stage == 0 && lane == 0) sums[s] = place;
      }
      if (stage == 0) {
        cluster_barrier();  // all sums are there
        if (warp == 0) {
          u32 before = kOne / 2;
#pragma unroll 1
          for (int base = 0; base < segments; base += 32) {
            const int s = base + lane;
            u32 total = 0, lower = 0;
            if (s < segments)
#pragma unroll
              for (int i = 0; i < kCluster; i++) {
                const u32 sum = of_block(sums, i)[s];
                if (i < rank) lower += sum;
                total += sum;
              }
            const u32 end = before + inclusive_scan_warp(total);
            if (s < segments) places[s] = end - total + lower;
            before = from_lane(end, 31);
          }
        }
        __syncthreads();
      } else if (stage == 1) {
        start = place_in_cluster(at);
      }
    }
  }
#endif

  // From what each thread is to write, rows and runs, to what is in front of that; notes how many there are of the pair.
  __device__ __forceinline__ Measure place_in_cluster(Measure mine) const {
    const i64 pair = static_cast<i64>(sequence) * p.h + head;
    Measure total;
    const Measure at = exclusive_scan(mine, total, shared->scan);
    if (threadIdx.x < kCluster) of_block(shared, static_cast<int>(threadIdx.x))->written[rank] = total;
    note(10);
    cluster_barrier();  // the last: from here on nobody looks into another's memory
    Measure before{0, 0}, all{0, 0};
#pragma unroll
    for (int i = 0; i < kCluster; i++) {
      if (i < rank) before = before + shared->written[i];
      all = all + shared->written[i];
    }
    if (rank == 0 && threadIdx.x == 0) {
      p.counts[pair] = static_cast<int>(min(all.rows, static_cast<u32>(p.t_cap)));
      p.run_counts[pair] = static_cast<int>(min(all.mass, static_cast<u32>(p.most_runs)));
    }
    return at + before;
  }

  // Writes the block's runs that are read, behind those of the blocks before it.
  __device__ __forceinline__ void write_runs() const {
    const Cut cut = shared->cut;
    const u32 most = static_cast<u32>(p.t_cap);
    int2* const to = p.runs + (static_cast<i64>(sequence) * p.h + head) * p.most_runs;
    Measure at{0, 0};  // rows and runs: of the thread, then before the run at hand
    each_run([&](int s, int list) {
      u32& key = keys[s * size.lists + list];
      key = read_of(cut, key, s, list);  // from here on the rows that are read
      at = at + Measure{key, key > 0};
    });
    at = place_in_cluster(at);
    each_run([&](int s, int list) {
      const u32 read = keys[s * size.lists + list];
      if (!read) return;
      at = at + Measure{read, 1};
      if (at.mass <= static_cast<u32>(p.most_runs))
        to[at.mass - 1] = make_int2(table[s * (size.lists + 1) + list + 1], static_cast<int>(at.rows < most ? at.rows : most));
    });
  }
};

}  // namespace

// Backend.route and then Backend.probe of backends/base.py, without nprobe and tail, with budgets of their own for every (sequence,
// KV head), and with samples where SAAP_SAMPLED. The positions of queries: see saap_route. Weights are float32, equal if their bits
// are; among equal ones newer segments come first, then lower lists. Runs are written in the order of (list's block, thread, run); of
// the one that the budget cuts the newest rows.
//
// Grid (SAAP_CLUSTER * h, b), clusters of SAAP_CLUSTER blocks in x; block SAAP_THREADS, a power of two.
// Shared memory: Shared, rounded up to 128, and what Block lays out behind it.
// Preconditions: 1 <= j <= SAAP_COLUMNS; outputs - l from 1 to 33; S * l < 2^31. Lengths that a table gives as negative count as none.
// May be launched as dependent. Then, with early, it starts on what no launch in front of it writes.
// Deterministic: sums of floats have a fixed order, and what atomics add are integers.
extern "C" __global__ void __launch_bounds__(kThreads, 1) saap_route_select(const __grid_constant__ RouteSelectParams p) {
  SAAP_SHARED(char, memory);
  if (!p.early) grid_dependency_wait();
  Block block(p, memory);
  block.prefetch();
  const i64 pair = static_cast<i64>(block.sequence) * p.h + block.head;
  const int budget = clamp(p.budgets[pair], 0, p.t_cap);
  const float unread_mass = p.unread_mass ? p.unread_mass[block.head] : -1.f;
#if SAAP_SAMPLED
  const int sampled = clamp(p.sampled[pair], 0, min(budget, 1 << 21)), exponent = p.exponents[block.head];
  const float cap = p.caps[block.head];
#endif
  block.clear_bins();
  cp_async_wait<1>();
  cluster_barrier();  // all blocks are there
  grid_dependency_wait();
  grid_dependency_launch();
  block.read_meta();
  if (p.tickets)
#pragma unroll 1
    for (int i = (blockIdx.y * gridDim.x + blockIdx.x) * kThreads + threadIdx.x; i < p.num_tickets;
         i += gridDim.x * gridDim.y * kThreads)
      p.tickets[i] = 0;
  block.note(0);
  block.route();
  bool wide = false;
#pragma unroll 1
  for (;; wide = true) {
    block.find_bends(wide);
    block.note(3);
    if (block.find_sums(wide)) break;
    cluster_barrier();  // all have read what they are about to overwrite
  }
  block.note(4);
  float units;
  const float total = block.weigh_runs(wide, units);
  block.note(5);
  Limits limits{static_cast<u32>(budget), kNoLimit, -1.0};
  if (unread_mass >= 0.f) {
    const double whole = static_cast<double>(total) * block.shared->most_share;
    limits.spare = whole > 0 ? static_cast<double>(unread_mass) * p.j / whole : 1.0;
  }
#if SAAP_SAMPLED
  limits.rows -= static_cast<u32>(sampled);
#endif
  if (limits.rows > 0) {
    block.find_cut(limits, units);
  } else {
    if (threadIdx.x == 0) block.shared->cut = take_nothing();
    __syncthreads();
  }
  block.note(9);
#if SAAP_SAMPLED
  block.find_probabilities(static_cast<u32>(sampled), clamp(exponent, 1, 64));
  block.write_samples(cap);
#else
  block.write_runs();
#endif
  block.note(11);
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_route_select() { return sizeof(RouteSelectParams); }
extern "C" int saap_sizeof_route_select_shared() { return (sizeof(Shared) + 127) / 128 * 128; }
#endif
