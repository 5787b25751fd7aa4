// The rows of largest inner product with each query: FAISS's search over a selection.
//
// An item is one query of one (sequence, KV head) with all of its query heads; its rows are scored a stretch at a time, and each
// head keeps the best so far in a heap whose top is the worst of them.
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"
#include "pool.h"
#include "rows.h"
#include "scratch.h"

namespace saap {
namespace {

constexpr int kStretch = 2048;

struct Hit {
  float score;
  int64_t place;  // in reading order
  int32_t row;
};

bool better(const Hit& a, const Hit& b) {
  const bool a_nan = std::isnan(a.score), b_nan = std::isnan(b.score);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.score != b.score) return a.score > b.score;
  return a.place < b.place;
}

}  // namespace

void best(const BestArgs& p, const Ints& sinks, const Ints& sealed, const Ints& lengths) {
  const Kernels& kern = kernels();
  const int dp = static_cast<int>(round_up(p.d, kern.round));
  std::atomic<bool> fine{true};
  pool().run(static_cast<int64_t>(p.b) * p.n_queries * p.h, [&](int64_t item) {
    thread_local Scratch memory;
    thread_local std::vector<std::vector<Hit>> heaps;
    const int64_t head = item % p.h, one = item / p.h, i = one / p.n_queries, j = one % p.n_queries;
    const int64_t listed = p.rows ? p.counts[one * p.h + head] : 0;
    const Source source{sinks[one], listed, sealed[one], lengths[one] - sealed[one], p.rows ? p.rows + (one * p.h + head) * p.t : nullptr};
    if (listed < 0 || listed > p.t) {
      fine.store(false, std::memory_order_relaxed);
      return;
    }
    const int64_t first = (i * p.h + head) * p.g;  // query head
    for (int column = 0; column < p.g; column += kScanColumns) {
      const int columns = std::min(kScanColumns, p.g - column);
      ScanItem it{};
      it.chunks = (columns + kern.lanes - 1) / kern.lanes;
      it.group = 1;
      while (it.group * it.chunks < columns) it.group *= 2;
      const int padded = it.chunks * it.group;
      float* packed = memory.get<float>(static_cast<size_t>(padded) * (dp + kStretch) + p.d);
      float* scores = packed + static_cast<size_t>(padded) * dp;
      float* row = scores + static_cast<size_t>(padded) * kStretch;
      std::fill(packed, scores, 0.f);
      for (int c = 0; c < columns; c++) {
        with_type(p.q_type, [&](auto x) {
          using T = decltype(x);
          const T* q = static_cast<const T*>(p.q) + ((first + column + c) * p.n_queries + j) * p.d;
          for (int n = 0; n < p.d; n++) row[n] = to_float(q[n]);
        });
        kern.pack_queries(p.type, row, p.d, dp, 1.f, packed + static_cast<size_t>(c) * dp);
      }
      it.q = packed, it.d = p.d, it.k_row = p.d, it.dp = dp;
      it.k = static_cast<const char*>(p.k) + (i * p.h + head) * p.N * p.d * static_cast<int64_t>(size_of(p.type));
      if (heaps.size() < static_cast<size_t>(columns)) heaps.resize(columns);
      for (int c = 0; c < columns; c++) heaps[c].clear();
      alignas(64) int32_t rows[kStretch + kScanPad];
      for (int64_t from = 0; from < source.total(); from += kStretch) {
        it.n = static_cast<int>(std::min<int64_t>(kStretch, source.total() - from));
        if (!source.read(from, it.n, p.N, rows)) {
          fine.store(false, std::memory_order_relaxed);
          return;
        }
        it.rows = rows;
        kern.scores(p.type, it, scores);
        const int64_t chunk = round_up(it.n, 16) * it.group;
        for (int c = 0; c < columns; c++) {
          std::vector<Hit>& heap = heaps[c];
          const float* s = scores + c / it.group * chunk + c % it.group;
          int n = 0;
          for (; n < it.n && heap.size() < static_cast<size_t>(p.best); n++) {
            heap.push_back({s[n * it.group], from + n, rows[n]});
            std::push_heap(heap.begin(), heap.end(), better);
          }
          float worst = heap.front().score;  // NaN where every one is: nothing is better then
          for (; n < it.n; n++) {
            const float score = s[n * it.group];
            if (score <= worst) continue;  // later, so not better if equal
            const Hit hit{score, from + n, rows[n]};
            if (!better(hit, heap.front())) continue;
            std::pop_heap(heap.begin(), heap.end(), better);
            heap.back() = hit;
            std::push_heap(heap.begin(), heap.end(), better);
            worst = heap.front().score;
          }
        }
      }
      for (int c = 0; c < columns; c++) {
        std::vector<Hit>& heap = heaps[c];
        std::sort_heap(heap.begin(), heap.end(), better);
        const int64_t at = ((first + column + c) * p.n_queries + j) * p.best;
        for (int64_t n = 0; n < p.best; n++) {
          const bool is = n < static_cast<int64_t>(heap.size());
          p.scores[at + n] = is ? heap[n].score : -std::numeric_limits<float>::infinity();
          p.found[at + n] = is ? heap[n].row : -1;
        }
      }
    }
  });
  if (!fine) throw std::out_of_range("best: rows, counts: a row number lies outside [0, " + std::to_string(p.N) + "), or a count is too large");
}

}  // namespace saap
