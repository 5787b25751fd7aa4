// Moving rows: sorting a stretch of the arena by list number, and appending tokens.
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

}  // namespace

void seal(DType type, void* keys, void* values, int32_t* ids, int h, int64_t N, int d, int e, int64_t start, int64_t n,
          const int32_t* list_nos, int l, int32_t* table, int64_t table_stride) {
  for (int64_t i = 0; i < h * n; i++)
    if (static_cast<uint32_t>(list_nos[i]) >= static_cast<uint32_t>(l))
      throw std::out_of_range("seal: list_nos: a list number lies outside [0, " + std::to_string(l) + ")");
  const int64_t size = static_cast<int64_t>(size_of(type));
  thread_local Scratch memory;  // of all heads at once: where there is none, no row has moved yet
  const int64_t room = 3 * n + l + 1 + (d + e + 1) * 4;
  int32_t* all = memory.get<int32_t>(h * room);
  thread_local Scratch counts;
  int64_t* found = counts.get<int64_t>(2 * h);  // of each head: rows that move, and their cycles
  // A block or a few thousand rows are done before a worker could wake up.
  const bool small = n * h * (d + e) * size < (1 << 20);
  auto run = [small](int64_t items, auto&& f) {
    if (small)
      for (int64_t i = 0; i < items; i++) f(i);
    else pool().run(items, f);
  };
  run(h, [&](int64_t head) {
    int32_t* next = all + head * room;
    int32_t *order = next + l + 1, *from = order + n, *cycles = from + n;
    const int32_t* list = list_nos + head * n;
    int32_t* offsets = table + head * table_stride;

    std::fill(next, next + l + 1, 0);
    for (int64_t i = 0; i < n; i++) next[list[i] + 1]++;
    for (int i = 0; i < l; i++) next[i + 1] += next[i];
    for (int i = 0; i <= l; i++) offsets[i] = static_cast<int32_t>(start) + next[i];
    for (int64_t i = 0; i < n; i++) from[next[list[i]]++] = static_cast<int32_t>(i);

    int32_t* id = ids + head * N + start;
    for (int64_t i = 0; i < n; i++) order[i] = id[from[i]];
    std::memcpy(id, order, sizeof(int32_t) * n);

    int64_t total = 0, num_cycles = 0;
    for (int32_t i = 0; i < n; i++) {
      if (from[i] < 0 || from[i] == i) continue;
      const int64_t first = total;
      for (int32_t k = i; from[k] >= 0;) {
        order[total++] = k;
        const int32_t source = from[k];
        from[k] = -1;  // visited
        k = source;
      }
      cycles[num_cycles++] = static_cast<int32_t>(total - first);
    }
    found[2 * head] = total;
    found[2 * head + 1] = num_cycles;
  });
  run(2 * h, [&](int64_t item) {  // keys and values apart: two cores help with a single head
    const int64_t head = item / 2, dim = item % 2 ? e : d;
    int32_t *order = all + head * room + l + 1, *cycles = order + 2 * n;
    char* spare = reinterpret_cast<char*>(cycles + n) + (item % 2 ? d * size : 0);
    char* rows = static_cast<char*>(item % 2 ? values : keys) + (head * N + start) * dim * size;
    move_rows(rows, dim * size, order, found[2 * head], cycles, found[2 * head + 1], spare);
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
  return finite;
}

}  // namespace saap
