// Search over pages: runs are counted from the list numbers that lie in the pages, the tokens of chosen runs are found by a second
// pass over these bytes, and what is read are rows of the pool, where they are.
#include "paged.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "rows.h"
#include "scratch.h"

namespace saap {
namespace {

constexpr int kLists = 256, kWords = kLists / 32;
constexpr int kAhead = 4;  // pages by which list numbers are fetched ahead: they lie far apart

// One sequence of a batch.
struct Sequence {
  const int32_t *blocks, *bounds;
  int64_t length;
  int segments;

  Sequence(const Paged& p, int64_t i)
      : blocks(p.blocks + i * p.most), bounds(p.bounds + i * (p.S + 1)), length(p.lengths[i]), segments(static_cast<int>(p.num_segments[i])) {}
  int64_t sinks() const { return segments ? bounds[0] : length; }
  int64_t sealed() const { return segments ? bounds[segments] : length; }
};

// Calls f(block, first token in it, tokens) for the pages of positions [from, to).
template <class F> void each_page(const Pages& pages, const Sequence& s, int64_t from, int64_t to, F&& f) {
  while (from < to) {
    const int64_t at = from / pages.page, place = from % pages.page, n = std::min(pages.page - place, to - from);
    f(s.blocks + at, static_cast<int>(place), static_cast<int>(n), to - from);
    from += n;
  }
}

const uint8_t* lists_of(const Pages& pages, int32_t block, int head) { return pages.lists + block * pages.lists_block + head * pages.lists_head; }

// The list numbers of positions [from, to) of a head, page by page: f(numbers, tokens, block, first token in it).
template <class F> void each_lists(const Pages& pages, const Sequence& s, int head, int64_t from, int64_t to, F&& f) {
  each_page(pages, s, from, to, [&](const int32_t* block, int place, int n, int64_t left) {
    if (left > static_cast<int64_t>(kAhead) * pages.page) {
      const uint8_t* later = lists_of(pages, block[kAhead], head);
      for (int i = 0; i < pages.page; i += 64) __builtin_prefetch(later + i);
    }
    f(lists_of(pages, *block, head) + place, n, *block, place);
  });
}

void check(const Pages& pages, const Paged& p) {
  for (int64_t i = 0; i < p.b; i++) {
    const Sequence s(p, i);
    const int64_t used = (s.length + pages.page - 1) / pages.page;
    if (s.length < 0 || used > p.most) throw std::out_of_range("pages: lengths: expected 0 to " + std::to_string(p.most * pages.page) + ", got " + std::to_string(s.length));
    uint32_t worst = 0;
    for (int64_t k = 0; k < used; k++) worst = std::max(worst, static_cast<uint32_t>(s.blocks[k]));
    if (used && worst >= static_cast<uint64_t>(pages.blocks)) throw std::out_of_range("pages: blocks: a block number lies outside [0, " + std::to_string(pages.blocks) + ")");
    for (int k = 0; k < s.segments; k++)
      if (s.bounds[k + 1] < s.bounds[k]) throw std::out_of_range("pages: bounds: expected ascending positions");
    if (s.segments && (s.bounds[0] < 0 || s.sealed() > s.length)) throw std::out_of_range("pages: bounds: a position lies outside [0, " + std::to_string(s.length) + "]");
  }
}

bool count_head(const Pages& pages, const Sequence& s, int head, int l, int32_t* table) {
  int32_t row = 0;
  bool fine = true;
  for (int k = 0; k < s.segments; k++, table += l + 1) {
    uint32_t counts[4][kLists] = {};  // equal numbers often follow each other, and would wait for one another in one table
    each_lists(pages, s, head, s.bounds[k], s.bounds[k + 1], [&](const uint8_t* lists, int n, int32_t, int) {
      int i = 0;
      for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++) counts[j][lists[i + j]]++;
      for (; i < n; i++) counts[0][lists[i]]++;
    });
    table[0] = row;
    for (int i = 0; i < kLists; i++) {
      const uint32_t n = counts[0][i] + counts[1][i] + counts[2][i] + counts[3][i];
      if (i < l) table[i + 1] = row += static_cast<int32_t>(n);
      else fine &= !n;
    }
  }
  return fine;
}

struct Part {
  int list, left_out, taken;
};

// Of segment k the tokens that `numbers` [from, to) name, of any runs, with their biases. False if they are not ascending rows of it.
bool find_some(const Pages& pages, const PageRows& rows, const Sequence& s, int head, int k, int l, const int32_t* table, const int32_t* numbers,
               const float* biases, int64_t from, int64_t to, int32_t* out, float* out_biases) {
  int32_t seen[kLists], wanted[kLists];  // the row that the next token of a list is, and the next one to be read
  int64_t at[kLists], ends[kLists];
  constexpr int32_t kNone = -1;
  int64_t next = from;
  for (int i = 0; i < kLists; i++) {
    seen[i] = i < l ? table[i] : 0, wanted[i] = kNone, at[i] = next;
    if (i >= l) continue;
    while (next < to && numbers[next] < table[i + 1]) {
      if (numbers[next] < (next > at[i] ? numbers[next - 1] + 1 : table[i])) return false;
      next++;
    }
    ends[i] = next;
    if (at[i] < next) wanted[i] = numbers[at[i]];
  }
  if (next != to) return false;
  int64_t found = 0;
  each_lists(pages, s, head, s.bounds[k], s.bounds[k + 1], [&](const uint8_t* lists, int n, int32_t block, int place) {
    for (int i = 0; i < n; i++) {
      const int list = lists[i];
      if (seen[list]++ != wanted[list]) continue;
      if (found < to - from) out[found] = block * rows.block + (place + i) * rows.token, out_biases[found] = biases[at[list]];
      found++;
      wanted[list] = ++at[list] < ends[list] ? numbers[at[list]] : kNone;
    }
  });
  return found == to - from;
}

// The rows of one head. False if `numbers` are not ascending rows of runs, without biases the last of each.
bool find_head(const Pages& pages, const PageRows& rows, const Sequence& s, int head, int l, const int32_t* table, const int32_t* numbers,
               int64_t count, int32_t* out, int64_t expected, const float* biases, float* out_biases) {
  thread_local Scratch memory;
  thread_local std::vector<Part> parts;
  int32_t *const begin = memory.get<int32_t>(expected + kFindPad + pages.page), *to = begin;
  auto whole = [&](int64_t from, int64_t stop) {
    each_page(pages, s, from, stop, [&](const int32_t* block, int place, int n, int64_t) {
      for (int i = 0; i < n; i++) *to++ = *block * rows.block + (place + i) * rows.token;
    });
  };
  auto pass = [&](int k, const uint32_t* chosen, int64_t room) {
    const Kernels& kern = kernels();
    int64_t found = 0;
    each_lists(pages, s, head, s.bounds[k], s.bounds[k + 1], [&](const uint8_t* lists, int n, int32_t block, int place) {
      if (found > room) return;  // the page in hand may still be written
      const int more = kern.find_lists(lists, n, chosen, block * rows.block + place * rows.token, rows.token, to + found);
      found += more;
    });
    return found == room;
  };
  if (out_biases) std::fill_n(out_biases, expected, 0.f);
  whole(0, s.sinks());
  int64_t at = 0;
  for (int k = 0; k < s.segments; k++, table += l + 1) {
    if (at < count && numbers[at] < table[0]) return false;
    if (at == count || numbers[at] >= table[l]) continue;
    if (biases) {
      const int64_t from = at;
      while (at < count && numbers[at] < table[l]) at++;
      if (to - begin + at - from > expected) return false;
      if (!find_some(pages, rows, s, head, k, l, table, numbers, biases, from, at, to, out_biases + (to - begin))) return false;
      to += at - from;
      continue;
    }
    if (count - at >= table[l] - table[0] && numbers[at + table[l] - table[0] - 1] == table[l] - 1 && numbers[at] == table[0]) {
      whole(s.bounds[k], s.bounds[k + 1]);
      at += table[l] - table[0];
      continue;
    }
    uint32_t chosen[kWords] = {};
    int64_t sure = 0;
    parts.clear();
    for (int i = 0; i < l && at < count; i++) {
      const int64_t from = at, run = table[i + 1] - table[i];
      while (at < count && numbers[at] < table[i + 1]) at++;
      const int64_t taken = at - from;
      if (!taken) continue;
      if (taken > run || numbers[from] != table[i + 1] - taken || numbers[at - 1] != table[i + 1] - 1) return false;
      if (taken == run) chosen[i / 32] |= 1u << i % 32, sure += run;
      else parts.push_back({i, static_cast<int>(run - taken), static_cast<int>(taken)});
    }
    if (to - begin + sure > expected) return false;
    if (sure && !pass(k, chosen, sure)) return false;
    to += sure;
    for (const Part& part : parts) {  // all tokens of that list, of which the newest stay
      uint32_t one[kWords] = {};
      one[part.list / 32] = 1u << part.list % 32;
      const int64_t all = part.left_out + part.taken;
      thread_local std::vector<int32_t> run;
      int32_t* const keep = to;
      run.resize(all + kFindPad + pages.page);
      to = run.data();
      const bool fine = pass(k, one, all);
      to = keep;
      if (!fine) return false;
      if (to - begin + part.taken > expected) return false;
      std::memcpy(to, run.data() + part.left_out, sizeof(int32_t) * part.taken);
      to += part.taken;
    }
  }
  if (at != count) return false;
  whole(s.sealed(), s.length);
  if (to - begin != expected) return false;
  std::memcpy(out, begin, sizeof(int32_t) * expected);
  return true;
}

}  // namespace

PageRows::PageRows(const Pages& p) {
  row = std::gcd(p.block_step, p.token_step);
  count = p.blocks ? (p.block_step * (p.blocks - 1) + p.token_step * (p.page - 1)) / row + 1 : 0;
  if (count > INT32_MAX) throw std::out_of_range("pages: expected rows that 32 bits can number, got " + std::to_string(count));
  block = static_cast<int32_t>(p.block_step / row), token = static_cast<int32_t>(p.token_step / row);
}

void write_pages(const Pages& p, Strided keys, Strided values, const int64_t* slots, int64_t n, const Quantizer* quantizer, const Angles& angles) {
  const int64_t size = static_cast<int64_t>(size_of(p.type));
  for (int64_t i = 0; i < n; i++)
    if (slots[i] >= p.blocks * p.page) throw std::out_of_range("pages: slots: a slot lies outside [0, " + std::to_string(p.blocks * p.page) + ")");
  thread_local Scratch memory;
  int32_t* list_nos = memory.get<int32_t>(quantizer ? p.h * n : 0);
  if (quantizer) assign(*quantizer, p.type, keys, n, angles, list_nos);
  constexpr int64_t kTokens = 64;
  const int64_t pieces = (n + kTokens - 1) / kTokens;
  pool().run(pieces * p.h, [&](int64_t item) {
    const int64_t head = item % p.h, from = item / p.h * kTokens, to = std::min(n, from + kTokens);
    for (int64_t i = from; i < to; i++) {
      if (slots[i] < 0) continue;
      const int64_t block = slots[i] / p.page, place = slots[i] % p.page;
      const int64_t at = (block * p.block_step + head * p.head_step + place * p.token_step) * size;
      auto copy = [&](const void* arena, const Strided& from_, int dim) {
        std::memcpy(static_cast<char*>(const_cast<void*>(arena)) + at, static_cast<const char*>(from_.data) + (head * from_.h + i * from_.n) * size, dim * size);
      };
      copy(p.k, keys, p.d);
      copy(p.v, values, p.e);
      if (quantizer) p.lists[block * p.lists_block + head * p.lists_head + place] = static_cast<uint8_t>(list_nos[head * n + i]);
    }
  });
}

void count_pages(const Pages& pages, const Paged& p, int l, int32_t* tables) {
  check(pages, p);
  std::atomic<bool> fine{true};
  pool().run(static_cast<int64_t>(p.b) * pages.h, [&](int64_t item) {
    const int64_t i = item / pages.h;
    if (!count_head(pages, Sequence(p, i), static_cast<int>(item % pages.h), l, tables + item * p.S * (l + 1))) fine.store(false);
  }, Pool::Next::kSoon);
  if (!fine) throw std::out_of_range("pages: lists: a list number lies outside [0, " + std::to_string(l) + ")");
}

void find_pages(const Pages& pages, const Paged& p, const FindArgs& a) {
  check(pages, p);
  const PageRows rows(pages);
  std::atomic<bool> fine{true};
  pool().run(static_cast<int64_t>(p.b) * pages.h, [&](int64_t item) {
    const Sequence s(p, item / pages.h);
    const int64_t sealed = s.sealed() - s.sinks();
    const int64_t count = a.counts ? a.counts[item] : sealed;
    const int64_t expected = s.length - sealed + count;
    if (count < 0 || count > sealed || (a.counts && count > a.t) || expected > a.most_rows) return fine.store(false);
    a.row_counts[item] = static_cast<int32_t>(expected);
    int32_t* out = a.rows + item * a.most_rows;
    const int64_t at = item * a.most_rows;
    if (count == sealed && !a.biases) {  // all of it, in order of arrival
      each_page(pages, s, 0, s.length, [&](const int32_t* block, int place, int n, int64_t) {
        for (int k = 0; k < n; k++) *out++ = *block * rows.block + (place + k) * rows.token;
      });
    } else if (!find_head(pages, rows, s, static_cast<int>(item % pages.h), a.l, a.tables + item * p.S * (a.l + 1), a.numbers + item * a.t, count, out, expected,
                          a.biases ? a.biases + item * a.t : nullptr, a.biases ? a.row_biases + at : nullptr)) {
      fine.store(false);
    }
  }, Pool::Next::kSoon);
  if (!fine) throw std::out_of_range("pages: numbers, tables: expected ascending rows, without biases the last of runs, of lists that are still what was counted");
}

void scan_pages(const Pages& pages, int b, const int32_t* rows, const int32_t* counts, int64_t t, const PagedScan& call) {
  const PageRows numbers(pages);
  ScanArgs s{};
  s.q = call.q, s.q_type = call.q_type, s.k = pages.k, s.v = pages.v, s.type = pages.type;
  s.b = b, s.h = pages.h, s.g = call.g, s.n_queries = call.n_queries, s.d = pages.d, s.e = pages.e, s.N = numbers.count;
  s.rows = t ? rows : nullptr, s.counts = counts, s.t = t;
  s.scale = call.scale, s.causal = call.causal, s.out = call.out, s.lse = call.lse;
  s.row = numbers.row, s.head_step = pages.head_step, s.biases = call.biases;
  const Ints none(b, 0);
  scan(s, none, none, none);
}

int64_t search_pages(const Pages& pages, const Paged& p, const PagedSearch& search, const PagedScan& call) {
  thread_local Scratch floats, ints;
  const int64_t heads = static_cast<int64_t>(p.b) * pages.h;
  int64_t bound = 0, longest = 0, segments = 0;
  for (int64_t i = 0; i < p.b; i++) {
    const Sequence s(p, i);
    const int64_t sealed = std::max<int64_t>(0, s.sealed() - s.sinks());
    int64_t most = 0;
    for (int64_t head = i * pages.h; s.segments && head < (i + 1) * pages.h; head++) most = std::max(most, std::min<int64_t>(search.budgets[head], sealed));
    bound = std::max(bound, most), longest = std::max(longest, s.length - sealed + most), segments = std::max<int64_t>(segments, s.segments);
  }
  const int l = search.router ? search.router->lists : 0;
  const int64_t table_size = heads * p.S * (l + 1);
  // tables, numbers, counts, rows, row counts
  int32_t* tables = ints.get<int32_t>(table_size + heads * (bound + longest + 2));
  int32_t *numbers = tables + table_size, *counts = numbers + heads * bound, *rows = counts + heads, *row_counts = rows + heads * longest;
  FindArgs find{l, tables, nullptr, nullptr, 0, longest, rows, row_counts};
  PagedScan reading = call;
  if (segments) {
    const Router& router = *search.router;
    count_pages(pages, p, l, tables);
    ProbeArgs a{};
    a.j = call.g * call.n_queries, a.l = l, a.m = router.knots;
    const int64_t biased = search.sampled ? heads * (bound + longest) : 0;
    float* z = floats.get<float>(heads * a.j * (a.l + a.m) + static_cast<int64_t>(p.b) * p.S + biased);
    float *bend = z + heads * a.j * a.l, *knots = bend + heads * a.j * a.m;
    const double last = std::max(0, a.m - 2);  // of the m columns the first m - 1 are knots
    for (int64_t i = 0; i < p.b; i++)
      for (int k = 0; k < p.S; k++) {
        const Sequence s(p, i);
        const double middle = k < s.segments ? (static_cast<double>(s.bounds[k]) + s.bounds[k + 1] - 1) / 2 : 0;
        const double distance = static_cast<double>(s.length - 1) - middle;
        knots[i * p.S + k] = static_cast<float>(std::clamp(std::log2(std::max(distance, 1.0)) - search.first_knot, 0.0, last));
      }
    route(router, call.q_type, call.q, p.b, call.g, call.n_queries, search.angles, z, bend);
    a.z = z, a.a = bend, a.knots = knots, a.tables = tables, a.b = p.b, a.h = pages.h, a.S = p.S;
    a.size_weighted = search.size_weighted, a.nprobe = search.nprobe, a.budgets = search.budgets, a.unread_mass = search.unread_mass;
    ProbeOut taken{bound, numbers, counts}, none{};
    if (search.sampled) {
      a.sampled = search.sampled, a.exponents = search.exponents, a.caps = search.caps;
      taken.biases = knots + static_cast<int64_t>(p.b) * p.S;
      find.biases = taken.biases, find.row_biases = taken.biases + heads * bound;
      reading.biases = find.row_biases;
    }
    probe(a, p.num_segments, {}, taken, none);
    find.numbers = numbers, find.counts = counts, find.t = taken.width;
    for (int64_t i = 0; i < heads; i++)
      if (!p.num_segments[i / pages.h]) counts[i] = 0;
  }
  find_pages(pages, p, find);
  scan_pages(pages, p.b, rows, row_counts, longest, reading);
  return std::accumulate(row_counts, row_counts + heads, int64_t{0});
}

}  // namespace saap
