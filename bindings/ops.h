// The operations of the CPU backend as plain functions: the contracts are those of saap_index/backends/base.py.
//
// Nothing here checks sizes; the caller (backends/cpu.py) has. Contents that index memory (row numbers, offsets, list numbers)
// are checked here: an operation that finds one out of range returns false or throws std::out_of_range.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "dtypes.h"

namespace saap {

using Ints = std::vector<int64_t>;

// A tensor with free strides over sequences, heads and tokens, in elements; the last axis is contiguous.
struct Strided {
  const void* data;
  int64_t b, h, n;
};

struct Angles {
  const float* cos = nullptr;  // (n, r / 2)
  const float* sin = nullptr;
  int r = 0;
  bool interleaved = false;
  float scale = 1;
};

// Weights in panels of kPanel columns, 64-byte aligned: see PanelProduct. One of weights, narrow and bytes is set.
struct Panels {
  int count = 0, k = 0, cols = 0;
  int64_t head_size = 0;  // weights per head
  std::shared_ptr<float[]> weights, bias;
  std::shared_ptr<uint32_t[]> narrow;
  std::shared_ptr<int8_t[]> bytes;
};

struct Quantizer {
  int heads, lists, dim;
  Panels panels;
};
// bias: (h, l), or null for that of Euclidean distance, -|c|^2 / 2.
std::shared_ptr<Quantizer> make_quantizer(const float* centroids, const float* bias, int h, int l, int d);
// keys: Strided with b unused.
void assign(const Quantizer&, DType, Strided keys, int64_t n, const Angles&, int32_t* list_nos);

// leading: outputs of the network before those of the knots, which are the scores, or what the lists are compared with.
struct Router {
  int heads, hidden_units, dim, lists, knots, leading;
  std::shared_ptr<float[]> scales;  // (heads, leading) of those outputs, if lists are compared with them
  Panels hidden, to_leading, to_knots, to_lists;
};
struct RouterArrays {
  const float *hidden, *bias_hidden, *out, *skip, *bias_out, *lists, *scales;  // lists: (h, l, k), scales: (h, k), or both null
};
std::shared_ptr<Router> make_router(const RouterArrays&, int h, int u, int d, int l, int m, int k);
void route(const Router&, DType, const void* queries, int b, int g, int q, const Angles&, float* z, float* a);
// The same in items: `items` of each of b * h heads, as route_items says; those of head i are [i * items, (i + 1) * items).
int64_t route_items(const Router&, int b, int g, int q);
void route_item(const Router&, DType, const void* queries, int g, int q, const Angles&, float* z, float* a, int64_t items, int64_t item);

struct ProbeArgs {
  const float *z, *a, *knots;
  const int32_t* tables;
  int b, h, j, l, m, S;
  bool size_weighted;
  int nprobe;
  const int32_t* budgets;  // (b, h)
  const float* unread_mass;       // (h) or null
  const int32_t* entries;  // (b, h) or null
  // Of the budgets, rows that are sampled, see Sample in saap_index/backends/types.py: (b, h) or null, and (h) each.
  const int32_t *sampled = nullptr, *exponents = nullptr;
  const float* caps = nullptr;
};
// Numbers of each head, up to `bound` of them. `probe` packs them: afterwards the first b * h * width elements are (b, h, width).
struct ProbeOut {
  int64_t bound;
  int32_t *numbers, *counts;  // (b, h, bound), (b, h)
  float* biases = nullptr;    // as numbers; of rows that are sampled
  int64_t width = 0;
};
// The most rows any head can come to.
int64_t probe_bound(const ProbeArgs&, const Ints& num_segments);
// means: leading segments of each sequence with means; tail is used if p.entries is.
void probe(const ProbeArgs& p, const Ints& num_segments, const Ints& means, ProbeOut& rows, ProbeOut& tail);
// The same a head at a time: probe_head of each, which is false if it cannot be, then finish_probe, if all were.
bool probe_head(const ProbeArgs&, const Ints& num_segments, const Ints& means, const ProbeOut& rows, const ProbeOut& tail, int64_t head);
void finish_probe(const ProbeArgs&, bool fine, ProbeOut& rows, ProbeOut& tail);

// Runs read through their means: numbers s * l + list of each head, and where their means and lengths are.
struct TailArgs {
  const int32_t *runs, *counts;  // (b, h, x), (b, h); runs null: none
  int64_t x;
  const void *k, *v;  // (b, h, M, l, d), (b, h, M, l, e)
  int64_t M;
  const int32_t* tables;  // (b, h, S, l + 1)
  int64_t S;
  int l;
};

// Rows that are stored as codes, see Coded in saap_index/backends/scalar_quantizer.py; keys null: none.
struct CodedRows {
  const uint8_t *k = nullptr, *v = nullptr;  // (b, h, N, code size)
  int64_t N = 0;
  int value_bits = 8;
  Ints first, last;  // (b)
};

struct ScanArgs {
  const void *q, *k, *v;
  DType q_type, type;  // of queries and out; of the arena
  int b, h, g, n_queries, d, e;
  int64_t N;
  const int32_t *rows, *counts;
  int64_t t;
  float scale;
  bool causal;
  void* out;
  float* lse;
  TailArgs tail;
  CodedRows coded;
  const float* biases = nullptr;  // (b, h, t), nats, of rows; null: 0 each
  // Of a pool that all sequences share: elements from row to row and from head to head, of K and V alike; its rows are all listed,
  // those that a causal query may not see last. row 0: an arena.
  int64_t row = 0, head_step = 0;
};
void scan(const ScanArgs&, const Ints& sinks, const Ints& sealed, const Ints& lengths);

// The `best` largest inner products of each query with the rows that it reads, best first, and these rows; of equal ones the row
// that is read first; -inf and -1 where there are fewer. NaN is larger than any number. A (sequence, query) is on its own: rows
// (b * n_queries, h, t) and counts (b * n_queries, h), sinks, sealed and lengths b * n_queries.
struct BestArgs {
  const void *q, *k;    // (b, h, g, n_queries, d), (b, h, N, d)
  DType q_type, type;
  int b, h, g, n_queries, d;
  int64_t N;
  const int32_t *rows, *counts;  // null: none
  int64_t t;
  int64_t best;
  float* scores;        // (b, h, g, n_queries, best)
  int64_t* found;       // likewise
};
void best(const BestArgs&, const Ints& sinks, const Ints& sealed, const Ints& lengths);

// What is the same in every search of a batch until tokens are sealed. Unset in `probe`: z, a, knots, j; in `scan`: queries, rows,
// out and the runs of the tail.
struct SearchPlan {
  std::shared_ptr<Router> router;
  ProbeArgs probe;
  ScanArgs scan;
  int first_knot;               // log2 of the distance of the first one
  std::vector<double> centres;  // (b, S) position of the middle of each segment
  Ints num_segments, means, sinks, sealed;
};
struct SearchCall {
  const void* q;
  DType q_type;
  int g, n_queries;
  Angles angles;
  Ints ends, lengths;  // of each sequence: the position that comes next; rows in use
  void* out;
  float* lse;
};
void search(const SearchPlan&, const SearchCall&, ProbeOut& rows, ProbeOut& tail);

struct AppendSide {
  Strided from;
  void* arena;  // (b, h, N, dim)
  int dim;
};
bool append(DType, const AppendSide& keys, const AppendSide& values, int b, int h, int64_t N, const Ints& starts, const Ints& counts);

void seal(DType, void* keys, void* values, int32_t* ids, int h, int64_t N, int d, int e, int64_t start, int64_t n,
          const int32_t* list_nos, int l, int32_t* table, int64_t table_stride);
// Sorts rows of neighbours, segments [bounds[p], bounds[p + 1]) that are sorted themselves, as those of one. tables: (h, parts, l + 1)
// strided over h, theirs; joined: (h, l + 1) out, strided over h, or null: `tables` becomes it, cut at the bounds.
void merge(DType, void* keys, void* values, int32_t* ids, int h, int64_t N, int d, int e, const Ints& bounds, int l, int32_t* tables,
           int64_t tables_stride, int32_t* joined, int64_t joined_stride);

// Bytes of the code of a row.
inline int64_t code_size(int64_t dim, int bits) { return dim * bits / 8 + 4; }
// Codes of rows (h, n, dim): out (h, n, code size), strided over h.
void encode(int bits, DType, Strided rows, int h, int64_t n, int dim, uint8_t* out, int64_t out_stride);

struct MeansSide {
  const void* rows;  // (h, N, dim)
  void* out;         // (h, l, dim), strided over h
  int64_t out_stride;
  int dim;
};
void means(DType, const MeansSide& keys, const MeansSide& values, int h, int64_t N, int l, const int32_t* table, int64_t table_stride);

void combine(DType, const void* out_a, const float* lse_a, const void* out_b, const float* lse_b, int64_t n, int e, void* out, float* lse);

// The sum of the words of memory, whole times 128 KiB, read by all threads together and by nothing but loads and additions.
uint64_t read_memory(const void* memory, int64_t bytes);
// GB/s of that, one figure per repetition.
std::vector<double> read_bandwidth(int64_t bytes, int repetitions);

}  // namespace saap
