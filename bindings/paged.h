// Operations over pages that somebody else owns, an engine's: the contracts are those of saap_index/backends/paged.py. As in ops.h,
// sizes have been checked, and contents that index memory (block, slot, list and row numbers) are checked here.
#pragma once
#include "ops.h"

namespace saap {

// Elements between blocks, heads and tokens are those of keys and values alike. lists: a byte for each token and head, tokens of a
// head side by side.
struct Pages {
  const void *k, *v;
  DType type;
  int h, d, e, page;  // tokens of a page
  int64_t blocks, block_step, head_step, token_step;
  uint8_t* lists;
  int64_t lists_block, lists_head;
};

// A row number counts `row` elements from the head's first: any page and token then has one.
struct PageRows {
  explicit PageRows(const Pages&);
  int64_t row, count;  // every number is below count
  int32_t block, token;
};

// The sequences of a batch. blocks (b, most): of each, in order. bounds (b, S + 1): of its num_segments segments, ascending.
struct Paged {
  int b, S;
  const int32_t* blocks;
  int64_t most;
  Ints lengths;
  const int32_t* bounds;
  Ints num_segments;
};

// Rows of keys and values, and their lists, of n tokens to slots block * page + place; a slot below 0 is left out. No quantizer: no
// lists are written. keys, values: Strided with b unused.
void write_pages(const Pages&, Strided keys, Strided values, const int64_t* slots, int64_t n, const Quantizer*, const Angles&);

// tables (b, h, S, l + 1).
void count_pages(const Pages&, const Paged&, int l, int32_t* tables);

// numbers (b, h, t), counts (b, h) as from probe; null: every token of the sequence. rows (b, h, most_rows), row_counts (b, h).
// With biases (b, h, t) the numbers of a run are any, and row_biases (b, h, most_rows) say which is whose; else the last ones.
struct FindArgs {
  int l;
  const int32_t *tables, *numbers, *counts;
  int64_t t, most_rows;
  int32_t *rows, *row_counts;
  const float* biases = nullptr;
  float* row_biases = nullptr;
};
void find_pages(const Pages&, const Paged&, const FindArgs&);

struct PagedScan {
  const void* q;
  DType q_type;
  int g, n_queries;
  float scale;
  bool causal;
  void* out;
  float* lse;
  const float* biases = nullptr;  // (b, h, t), nats, of rows; null: 0 each
};
// rows (b, h, t), counts (b, h).
void scan_pages(const Pages&, int b, const int32_t* rows, const int32_t* counts, int64_t t, const PagedScan&);

// count, route, probe, find and the causal scan in one. A sequence without segments is read whole. budgets (b, h); unread_mass (h) or null.
struct PagedSearch {
  const Router* router;
  int first_knot;
  bool size_weighted;
  Angles angles;
  int nprobe;
  const int32_t* budgets;
  const float* unread_mass;
  const int32_t *sampled = nullptr, *exponents = nullptr;  // as in ProbeArgs
  const float* caps = nullptr;
};
// Returns the rows read of all sequences and heads.
int64_t search_pages(const Pages&, const Paged&, const PagedSearch&, const PagedScan&);

}  // namespace saap
