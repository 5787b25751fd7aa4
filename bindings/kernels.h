// The inner loops, compiled once per instruction set, behind one table of functions chosen at run time.
//
// Everything here works on one head and is single-threaded; the operations in ops.h cut the work and call these.
#pragma once
#include <cstdint>

#include "dtypes.h"

namespace saap {

constexpr int kPanel = 16;       // output columns of a weight panel, for every instruction set
constexpr int kScanPad = 48;     // valid row numbers that must follow the last one of a ScanItem, for prefetching
constexpr int kScanColumns = 64; // most query columns of a ScanItem
constexpr int kEncodeRows = 8;   // most rows that `encode` is given at once
constexpr int kFindPad = 16;     // numbers that find_lists and heavy_runs may overwrite behind their last

// Attention of a few query columns over listed rows of one head. All columns pass over a block of rows while it is in cache.
struct ScanItem {
  const float* q;         // (chunks * group, dp) from pack_queries
  const void* k;          // (N, d) storage type
  const void* v;          // (N, e)
  int64_t k_row, v_row;   // elements from one row to the next, at least d and e
  int d, e, dp, ep;       // dp, ep: d, e rounded up to `round` of the kernel table
  const int32_t* rows;    // (n + kScanPad), n > 0
  int n;
  const int32_t* places;  // (n) what limits speak of: rows, or the place of each in the order of reading; read with limits only
  const int32_t* limits;  // (chunks * group) a column sees places below its limit only; null: sees all
  int32_t limits_from;    // the least of limits
  const float* bias;      // (n) added to the score of a row, log2 units; null: none
  int group, chunks;      // group: columns per chunk, a power of two <= lanes
  float *o, *m, *l;       // out: (chunks * group, ep) unnormalised sums in packed order; maximum in log2 units; sum of weights
};

// Keys of one head: float (n, k) rows against panels of kPanel columns, laid out (panels, k, kPanel). Narrow panels hold bfloat16,
// (panels, k, kPanel / 2) words with columns i and i + kPanel / 2 in the lower and the upper half of word i; those of bytes whole
// numbers, laid out as floats are.
struct PanelProduct {
  const float* x;       // (n, k), row stride ldx
  int n, k;
  int64_t ldx;
  const float* panels;  // one of these three is set
  const uint32_t* narrow;
  const int8_t* bytes;
  const float* bias;    // (num_panels * kPanel)
  int num_panels;

  const float* wide_at(int panel) const { return panels + static_cast<int64_t>(panel) * k * kPanel; }
  const int8_t* bytes_at(int panel) const { return bytes + static_cast<int64_t>(panel) * k * kPanel; }
  const uint32_t* narrow_at(int panel) const { return narrow + static_cast<int64_t>(panel) * k * (kPanel / 2); }
};

// One selection, see Backend.probe. lp: l rounded up to a multiple of kPanel.
struct ProbeHead {
  const float* z;         // (j, l)
  const float* a;         // (j, s) interpolated, natural log
  const float* share;     // (j) how much each column counts in the sum over the group
  const int32_t* tables;  // (s, l + 1)
  int j, l, s, lp;
  bool size_weighted;
  float* e;               // scratch (j, lp)
  float* c;               // scratch (j, s)
};

struct Kernels {
  const char* name;
  int lanes;
  int round;  // head dims are padded to a multiple of this in packed queries and accumulators

  void (*scan)(DType, const ScanItem&);
  // s (chunks, n rounded up to a multiple of 16, group): inner products of packed queries and rows, no bias and no limits; nothing
  // of the values is read or written.
  void (*scores)(DType, const ScanItem&, float* s);
  // Packed queries: row c of q times `scale`, in the order in which scan widens the storage type; the rest of dp is zero.
  void (*pack_queries)(DType, const float* row, int d, int dp, float scale, float* packed);
  // The inverse for one accumulated row: packed (ep) to plain (e).
  void (*unpack_values)(DType, const float* packed, int e, float* row);

  // scan over rows of codes (codes.inl.h): keys of 8 bits, values of 8 or 4. q and o in plain order. Values of 4 bits are
  // added up rotated, and rotate_back of an accumulated row gives its numbers.
  void (*scan_codes)(int value_bits, const ScanItem&);
  void (*rotate_back)(float* row, int dim);
  // The codes of n rows, kEncodeRows at most, of dim floats, finite, with zeros behind them up to a multiple of `lanes`.
  void (*encode)(int bits, const float* rows, int64_t stride, int n, int dim, uint8_t* codes);

  // best[i] = argmax over columns of x_i w + bias, the lower on ties. Wide panels only.
  void (*nearest)(const PanelProduct&, int32_t* best);
  // y (n, ldy) = x w + bias, columns [0, cols) of panels [0, num_panels); silu: y silu(y).
  void (*dense)(const PanelProduct&, bool silu, float* y, int64_t ldy, int cols);
  // d values of a storage type as floats, rotated back by cos, sin (r / 2), pairs as in Rotation. r = 0: not rotated.
  void (*load_row)(DType, const void* src, int d, const float* cos, const float* sin, int r, bool interleaved, float scale, float* dst);

  // w (s, lp): weight of each run, 0 where it is empty. Returns false if a sum underflowed: the caller must do it in float64.
  bool (*run_weights)(const ProbeHead&, float* w);
  // w (lp): weight of each list from z alone.
  bool (*list_weights)(const ProbeHead&, float* w);

  // Numbers of those of n weights, n a multiple of kPanel, that are `least` or more, ascending; returns how many. May overwrite
  // kFindPad numbers behind the last.
  int (*heavy_runs)(const float* w, int n, float least, int32_t* out);

  // Of tokens [0, n) of a page, numbered first + i * step, those whose list is chosen: a bit for each of 256 lists. Writes up to n
  // numbers, and may overwrite kFindPad beyond them; returns how many.
  int (*find_lists)(const uint8_t* lists, int n, const uint32_t* chosen, int32_t first, int32_t step, int32_t* out);
};

// The table in use: the best that this processor can run, or what select_isa chose.
const Kernels& kernels();
// "baseline", "avx2" or "avx512". False, changing nothing, if the processor (or the build) lacks it.
bool select_isa(const char* name);
bool isa_supported(const char* name);

}  // namespace saap
