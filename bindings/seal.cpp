// Moving rows: sorting a stretch of the arena by list number, merging sorted ones, and appending tokens.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

namespace saap {
namespace {

// Moves row from[i] to row i for all i of the cycles that `order` lists: (i, from[i], from[from[i]], ..., i) each, one after
// the other, lengths in `cycles`. In place, each row read once and written once; one row of spare room.
void move_rows(char* rows, int64_t bytes, const int32_t* order, int64_t total, const int32_t* cycles, int64_t num_cycles, char* spare) {
  constexpr int64_t kAhead = 8;
  int64_t at = 0;
  for (int64_t c = 0; c < num_cycles; c++) {
    const int64_t end = at + cycles[c];
    std::memcpy(spare, rows + order[at] * bytes, bytes);
    for (; at + 1 < end; at++) {
      if (at + kAhead < total)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(rows + order[at + kAhead] * bytes + i, 1, 2);
      std::memcpy(rows + order[at] * bytes, rows + order[at + 1] * bytes, bytes);
    }
    std::memcpy(rows + order[at++] * bytes, spare, bytes);
  }
}

// Where the rows of one head go: of `from` (n), the row that comes to each place, the cycles in the order that move_rows takes, up to
// n numbers each. Overwrites from.
struct Cycles {
  int64_t rows = 0, count = 0;
};
Cycles cycles_of(int32_t* from, int64_t n, int32_t* order, int32_t* cycles) {
  Cycles found;
  for (int32_t i = 0; i < n; i++) {
    if (from[i] < 0 || from[i] == i) continue;
    const int64_t first = found.rows;
    for (int32_t k = i; from[k] >= 0;) {
      order[found.rows++] = k;
      const int32_t source = from[k];
      from[k] = -1;  // visited
      k = source;
    }
    cycles[found.count++] = static_cast<int32_t>(found.rows - first);
  }
  return found;
}

// Moves rows [start, start + n) of every head. fill(head, from, spare) says where each comes from, and may write what belongs to it;
// spare: `extra` numbers of its own. A block or a few thousand rows are done before a worker could wake up.
template <class Fill>
void permute(DType type, void* keys, void* values, int32_t* ids, int h, int64_t N, int d, int e, int64_t start, int64_t n, int64_t extra, Fill&& fill) {
  const int64_t size = static_cast<int64_t>(size_of(type));
  thread_local Scratch memory;  // of all heads at once: where there is none, no row has moved yet
  const int64_t room = 3 * n + (d + e + 1) * 4 + extra;
  int32_t* all = memory.get<int32_t>(h * room);
  thread_local Scratch counts;
  Cycles* found = counts.get<Cycles>(h);
  const bool small = n * h * (d + e) * size < (1 << 20);
  auto run = [small](int64_t items, auto&& f) {
    if (small)
      for (int64_t i = 0; i < items; i++) f(i);
    else pool().run(items, f);
  };
  run(h, [&](int64_t head) {
    int32_t *order = all + head * room, *from = order + n, *cycles = from + n;
    fill(head, from, all + (head + 1) * room - extra);
    int32_t* id = ids + head * N + start;
    for (int64_t i = 0; i < n; i++) order[i] = id[from[i]];
    std::memcpy(id, order, sizeof(int32_t) * n);
    found[head] = cycles_of(from, n, order, cycles);
  });
  run(2 * h, [&](int64_t item) {  // keys and values apart: two cores help with a single head
    const int64_t head = item / 2, dim = item % 2 ? e : d;
    int32_t *order = all + head * room, *cycles = order + 2 * n;
    char* spare = reinterpret_cast<char*>(cycles + n) + (item % 2 ? d * size : 0);
    char* rows = static_cast<char*>(item % 2 ? values : keys) + (head * N + start) * dim * size;
    move_rows(rows, dim * size, order, found[head].rows, cycles, found[head].count, spare);
  });
}

}  // namespace

void seal(DType type, void* keys, void* values, int32_t* ids, int h, int64_t N, int d, int e, int64_t start, int64_t n,
          const int32_t* list_nos, int l, int32_t* table, int64_t table_stride) {
  for (int64_t i = 0; i < h * n; i++)
    if (static_cast<uint32_t>(list_nos[i]) >= static_cast<uint32_t>(l))
      throw std::out_of_range("seal: list_nos: a list number lies outside [0, " + std::to_string(l) + ")");
  permute(type, keys, values, ids, h, N, d, e, start, n, l + 1, [&](int64_t head, int32_t* from, int32_t* next) {
    const int32_t* list = list_nos + head * n;
    int32_t* offsets = table + head * table_stride;
    std::fill(next, next + l + 1, 0);
    for (int64_t i = 0; i < n; i++) next[list[i] + 1]++;
    for (int i = 0; i < l; i++) next[i + 1] += next[i];
    for (int i = 0; i <= l; i++) offsets[i] = static_cast<int32_t>(start) + next[i];
    for (int64_t i = 0; i < n; i++) from[next[list[i]]++] = static_cast<int32_t>(i);
  });
}

void merge(DType type, void* keys, void* values, int32_t* ids, int h, int64_t N, int d, int e, const Ints& bounds, int l,
           int32_t* tables, int64_t tables_stride, int32_t* joined, int64_t joined_stride) {
  const int64_t parts = static_cast<int64_t>(bounds.size()) - 1, start = bounds.front(), n = bounds.back() - start;
  auto part = [&](int64_t head, int64_t p) { return tables + head * tables_stride + p * (l + 1); };
  for (int64_t head = 0; head < h; head++)
    for (int64_t p = 0; p < parts; p++) {
      const int32_t* t = part(head, p);
      bool fine = t[0] == bounds[p] && t[l] == bounds[p + 1];
      for (int i = 0; i < l; i++) fine &= t[i] <= t[i + 1];
      if (!fine) throw std::out_of_range("merge: tables: the offsets of a segment are not ascending, or not those of its rows");
    }
  permute(type, keys, values, ids, h, N, d, e, start, n, 0, [&](int64_t head, int32_t* from, int32_t*) {
    int32_t at = 0;
    for (int i = 0; i < l; i++)
      for (int64_t p = 0; p < parts; p++) {
        const int32_t* t = part(head, p);
        for (int32_t row = t[i]; row < t[i + 1]; row++) from[at++] = row - static_cast<int32_t>(start);
      }
    for (int i = 0; i <= l; i++) {
      int64_t offset = start;
      for (int64_t p = 0; p < parts; p++) offset += part(head, p)[i] - bounds[p];
      if (joined) joined[head * joined_stride + i] = static_cast<int32_t>(offset);
      else
        for (int64_t p = 0; p < parts; p++) part(head, p)[i] = static_cast<int32_t>(std::clamp(offset, bounds[p], bounds[p + 1]));
    }
  });
}

namespace {

// True if no element has an exponent of all ones, the mark of infinity and NaN in each of the storage types.
template <class Word>
bool all_finite(const Word* x, int64_t n, Word exponent) {
  Word bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= static_cast<Word>((x[i] & exponent) == exponent);
  return !bad;
}

bool row_finite(DType type, const char* row, int64_t n) {
  switch (type) {
    case DType::bf16: return all_finite<uint16_t>(reinterpret_cast<const uint16_t*>(row), n, 0x7f80);
    case DType::f16: return all_finite<uint16_t>(reinterpret_cast<const uint16_t*>(row), n, 0x7c00);
    default: return all_finite<uint32_t>(reinterpret_cast<const uint32_t*>(row), n, 0x7f800000);
  }
}

// Pages of memory that nothing was written to are brought by the system when it is, a huge one in some hundred microseconds, and
// all heads come to theirs with the same token where capacities are round. So a row is touched some tokens ahead of its own, of each
// head and side with another token.
constexpr int64_t kTouchAhead = 64, kPage = 4096;

void touch_ahead(char* arena, int64_t row_bytes, int64_t start, int64_t stop, int64_t N) {
  for (int64_t r = start; r < std::min(stop, N); r++) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(arena) + r * row_bytes, last = first + row_bytes - 1;
    if (first / kPage == last / kPage && first % kPage) continue;  // its page holds the row before, too
    volatile char* byte = reinterpret_cast<volatile char*>(last);
    *byte = *byte;
  }
}

}  // namespace

bool append(DType type, const AppendSide& keys, const AppendSide& values, int b, int h, int64_t N, const Ints& starts, const Ints& counts) {
  constexpr int64_t kRows = 256;
  const int64_t size = static_cast<int64_t>(size_of(type));
  int64_t most = 0;
  for (int64_t c : counts) most = std::max(most, c);
  const int64_t blocks = (most + kRows - 1) / kRows;
  // Calls f(source row, arena row, rows, dim bytes, source row stride) for each stretch of tokens in block `item`.
  auto each = [&](int64_t item, auto&& f) {
    const int64_t block = item % blocks, bh = item / blocks, i = bh / h, head = bh % h;
    const int64_t from = block * kRows, n = std::min(counts[i] - from, kRows);
    if (n <= 0) return;
    for (const AppendSide* side : {&keys, &values}) {
      const Strided& s = side->from;
      f(static_cast<const char*>(s.data) + (i * s.b + head * s.h + from * s.n) * size,
        static_cast<char*>(side->arena) + ((i * h + head) * N + starts[i] + from) * side->dim * size, n, side->dim * size, s.n * size);
    }
  };
  std::atomic<bool> finite{true};
  auto check = [&](int64_t item) {
    each(item, [&](const char* src, char*, int64_t n, int64_t bytes, int64_t stride) {
      bool fine = true;
      for (int64_t r = 0; r < n && fine; r++) fine = row_finite(type, src + r * stride, bytes / size);
      if (!fine) finite.store(false, std::memory_order_relaxed);
    });
  };
  auto copy = [&](int64_t item) {
    each(item, [&](const char* src, char* dst, int64_t n, int64_t bytes, int64_t stride) {
      if (stride == bytes) std::memcpy(dst, src, n * bytes);
      else
        for (int64_t r = 0; r < n; r++) std::memcpy(dst + r * bytes, src + r * stride, bytes);
    });
  };
  const int64_t items = blocks * b * h;
  // A token or a few are done before a worker could wake up.
  const bool small = most * b * h * (keys.dim + values.dim) * size < (1 << 18);
  auto run = [&](auto&& f) {
    if (small)
      for (int64_t i = 0; i < items; i++) f(i);
    else pool().run(items, f);
  };
  run(check);
  if (finite) run(copy);
  int64_t ahead = kTouchAhead;
  for (const AppendSide* side : {&keys, &values})
    for (int64_t bh = 0; bh < static_cast<int64_t>(b) * h && finite; bh++, ahead++) {
      const int64_t bytes = side->dim * size, stop = starts[bh / h] + counts[bh / h];
      touch_ahead(static_cast<char*>(side->arena) + bh * N * bytes, bytes, small ? starts[bh / h] + ahead : stop, stop + ahead, N);
    }
  return finite;
}

}  // namespace saap
