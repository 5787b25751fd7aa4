// What every part of the scan kernels shares: the macros of a configuration, the parameters, the shape of a tile in shared
// memory. The kernels' contract is at the top of scan.cu.
//
// Macros of a configuration:
//   SAAP_D, SAAP_E   key and value dims, multiples of 8      SAAP_T, SAAP_TQ   dtype of the storage and of the queries
//   SAAP_GROUPS      query vectors of a pass, in eights      SAAP_TILE         tokens a warp takes at once, 16 or 32
//   SAAP_STAGES      tiles in flight per warp                SAAP_WARPS        warps of a block
//   SAAP_BLOCKS      blocks of a multiprocessor
//   SAAP_RUNS        runs that a block has in shared memory, at least 32
//   SAAP_PAGED       1: rows of an engine's pool, all of them listed, instead of an arena's
//   SAAP_CODED       bits of a value, 8 or 4, of rows that are codes (scan_codes.cu); 0 of numbers
//   SAAP_WEIGHTED    1: runs are samples with a bias of their own, see Weight; without it nothing of them is compiled
//   SAAP_CLOCK       0, or 1: blocks note when they pass the points below
#pragma once
#include "prims.cuh"

#ifndef SAAP_CLOCK
#define SAAP_CLOCK 0
#endif
#ifndef SAAP_PAGED
#define SAAP_PAGED 0
#endif
#ifndef SAAP_CODED
#define SAAP_CODED 0
#endif
#ifndef SAAP_WEIGHTED
#define SAAP_WEIGHTED 0
#endif
#ifndef SAAP_RUNS
#define SAAP_RUNS 1024
#endif
#include "softmax_state.cuh"

constexpr int kD = SAAP_D, kE = SAAP_E, kStorage = SAAP_T, kQuery = SAAP_TQ;
constexpr int kGroups = SAAP_GROUPS, kTile = SAAP_TILE, kStages = SAAP_STAGES, kWarps = SAAP_WARPS, kThreads = 32 * kWarps;
constexpr int kVectors = 8 * kGroups;  // of one pass
constexpr int kPlaces = 32, kRuns = SAAP_RUNS;  // pairs and runs that a block has at hand
constexpr u32 kAll = 0xffffffffu;
static_assert(SAAP_CODED == 0 || (kStorage == kF16 && !SAAP_PAGED), "codes are read as fp16");
static_assert(!(SAAP_PAGED && SAAP_WEIGHTED), "pages have no runs");
static_assert(kD % 8 == 0 && kE % 8 == 0 && (kTile == 16 || kTile == 32) && kStages >= 2 && kRuns >= kPlaces,
              "no such configuration");

// Of a run of a weighted selection, that begins at row `first`, `before` entries of the list before it: its i-th row, i = 1, 2, ...,
// is first - 1 + ceil((i * 2^20 - offset) / probability), the ceiling of a quotient. Of rows one after the other probability is
// 2^20, offset 0. 0 < probability <= 2^20, 0 <= offset < 2^20.
struct alignas(16) Weight {
  int before, probability, offset;
  float bias;  // nats, of the logits of its rows
};

// Pairs are (sequence, KV head), p = b * heads + h. Everything is C-contiguous. Rows, counts and their like are clamped.
// SAAP_PAGED: keys and values are of a pool that all sequences share, strides below; rows are the whole list, N of them are there,
// and meta, runs, tail and dense are null.
struct ScanParams {
  const void* queries;      // dtype TQ (b, h, j, d), the q queries of a head innermost in j
  const void* keys;         // dtype T (b, h, N, d), 16-byte aligned
  const void* values;       // dtype T (b, h, N, e), 16-byte aligned
  const int* rows;          // int32 (b, h, t), or null: none
  const int2* runs;         // int32 (b, h, R, 2), read if rows is null, or null: none
  const int* run_counts;    // int32 (b, h), read if runs is
  const int* counts;        // int32 (b, h) rows listed, or in runs
  const int* tail;          // int32 (b, h, x) run numbers, segment * l + list, or null: none
  const int* tail_counts;   // int32 (b, h), read if tail is given, as are the three that follow
  const void* mean_keys;    // dtype T (b, h, M, l, d), 16-byte aligned
  const void* mean_values;  // dtype T (b, h, M, l, e), 16-byte aligned
  const int* tables;        // int32 (b, h, S, l + 1)
  const int* meta;          // int32 (b, 8): length, sinks, sealed, ..., 16-byte aligned
  float* partials;          // float32 (passes, grid + b * h, vectors, e): scratch
  float* masses;            // float32 (passes, grid + b * h, vectors, 2): scratch
  u32* tickets;             // u32 (passes, b * h): zeros before a launch; every launch leaves zeros
  void* out;                // dtype TQ (b, h, j, e)
  float* lse;               // float32 (b, h, j), natural log
  float scale_log2;         // of the logits, times log2 e
  float inverse_heads, inverse_queries;  // 1 / heads and 1 / q, rounded
  int sequences, heads;
  int vectors, num_queries;  // j and q
  int capacity;              // N
  int max_rows, max_tail;    // t and x
  int max_runs;              // R
  int max_segments, max_means, lists;  // S, M <= S, l
  int causal, dense;
#if SAAP_WEIGHTED
  const Weight* weights;  // (b, h, R), of runs, whose first number is then `first` and the rows in it: a run may have gaps
#endif
#if SAAP_PAGED
  i64 head_bytes;  // from a head's rows to the next one's
  int row_bytes;   // from a row to the next, a multiple of 16, as are head_bytes
#endif
#if SAAP_CODED
  const int4* spans;  // int32 (b, 4), 16-byte aligned: first and past the last coded row, the first of those
                      // behind the segments, past the last of those among the sinks
#endif
#if SAAP_CLOCK
  i64* clocks;  // int64 (passes, grid, kPoints), cycles, or null; points that a block does not pass are left alone
#endif
};

// Where a block is: it began; the launch ahead is over; its work is planned; the first copies are started, and there; its last tile
// is added; its warps are merged; it has its ticket; it ends. Of the pairs of a block the last one counts.
enum Point { kBegan, kWaited, kPlanned, kCopying, kArrived, kAdded, kMerged, kTicketed, kEnded, kPoints };

SAAP_PRIM void note(const ScanParams& p, Point point) {
#if SAAP_CLOCK
  const i64 block = static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0 && p.clocks) p.clocks[block * kPoints + point] = clock64();
#endif
}

// How rows of `dim` elements lie in shared memory: in chunks of 16 bytes, as many as whole steps of the matrix instruction
// need, swapped within a row such that eight rows of one chunk lie in different banks.
template <int dim>
struct RowShape {
  static constexpr int kBytes = dim * static_cast<int>(sizeof(element_t<kStorage>));  // in device memory
  static constexpr int kFilled = kBytes / 16;                                         // chunks that hold data
  static constexpr int kChunks = kStorage == kF32 ? kFilled : (dim + 15) / 16 * 2;    // even
  static constexpr int kTileBytes = kTile * kChunks * 16;
  // Rows are an odd multiple of this many chunks apart; exchanges stay within as many.
  static constexpr int kGroup = (kChunks & -kChunks) < 8 ? (kChunks & -kChunks) : 8;
  static SAAP_PRIM int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row / (8 / kGroup) & (kGroup - 1)))) * 16;
  }
};
using KeyShape = RowShape<kD>;
using ValueShape = RowShape<kE>;

// Codes lie in shared memory as in device memory, rows of words an odd multiple of 16 bytes apart: what the lanes of a fragment
// read then lies in different banks.
constexpr int coded_words(int dim, int bits) { return dim * bits / 32 + 1; }
constexpr int coded_stride(int words) { return ((words + 3) / 8 * 8 + 4) * 4; }
constexpr int kKeyWords = coded_words(kD, 8), kValueWords = coded_words(kE, SAAP_CODED);
constexpr int kKeyStride = coded_stride(kKeyWords), kValueStride = coded_stride(kValueWords);

constexpr int kStageBytes = SAAP_CODED ? kTile * (kKeyStride + kValueStride) : KeyShape::kTileBytes + ValueShape::kTileBytes;

// Dynamic shared memory: stages (kWarps, kStages, kStageBytes), the work of the block (scan_walk.cuh), masses, what the core
// wants for itself, and kWarps * 8 * kStride floats of values.
constexpr int kStagesBytes = kWarps * kStages * kStageBytes, kWorkBytes = 48 + 48 * kPlaces + 8 * kRuns;
constexpr int kCoreOffset = kWorkBytes + kWarps * 64;
constexpr int kCoreBytes = kStorage == kF32 ? 8 * kD * 4 + kWarps * 8 * kTile * 4 : 0;
constexpr int kStride = (kE + 15) / 16 * 16 + 4;  // floats between value sums: the lanes of a fragment hit different banks

SAAP_PRIM int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
SAAP_PRIM int ceil_div(int x, int y) { return (x + y - 1) / y; }
// x / y of 0 <= x < 2^22, y its inverse, rounded: exact.
SAAP_PRIM int divided(int x, float inverse) { return static_cast<int>((static_cast<float>(x) + 0.5f) * inverse); }

SAAP_PRIM float warp_max(float x) {
#pragma unroll
  for (int o = 16; o; o /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, o));
  return x;
}
