// Attention over sinks, listed rows, recent rows and means of runs: cuts the work into items of rows, runs them, merges them in
// item order. Where sealed rows are codes, rows of numbers and rows of codes are items of their own.
//
// How a head is cut depends on its own row count only, and the merge follows item order, so neither the number of threads nor
// the rest of the batch changes a bit of the result. Whoever finishes the last item of a head merges it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "../cuda/softmax_state.cuh"
#include "kernels.h"
#include "ops.h"
#include "pool.h"
#include "rows.h"
#include "scratch.h"

namespace saap {
namespace {

constexpr int64_t kMostRows = 2048, kLeastRows = 256;  // of an item: small enough to share out, large beside its merge

// The runs of one head that are read through their means, and where in the means of that head they lie.
struct Entries {
  const int32_t* runs;
  int64_t count;

  // Rows of means [from, from + n), then kScanPad repeats of the last, and the log2 of their tokens. False if there is no such run.
  bool read(const TailArgs& p, int64_t head, int64_t from, int n, int32_t* rows, float* bias) const {
    for (int i = 0; i < n; i++) {
      const int32_t run = runs[from + i];
      if (run < 0 || run >= std::min(p.M, p.S) * p.l) return false;
      const int32_t* table = p.tables + (head * p.S + run / p.l) * (p.l + 1) + run % p.l;
      if (table[1] <= table[0]) return false;
      rows[i] = run;
      bias[i] = std::log2(static_cast<float>(table[1] - table[0]));
    }
    std::fill(rows + n, rows + n + kScanPad, rows[n - 1]);
    return true;
  }
};

// The biases of listed rows of one head, in the order of its list; null: 0 each.
//
// Of places [from, from + n) of a source, the biases in log2 units. False, with nothing written, if all are 0.
bool read_biases(const float* biases, const Source& s, int64_t from, int n, float* bias) {
  const int64_t first = std::clamp(s.sinks - from, int64_t(0), int64_t(n)), last = std::clamp(s.sinks + s.listed - from, int64_t(0), int64_t(n));
  const float* listed = biases + (from - s.sinks);
  bool any = false;
  for (int64_t i = first; i < last; i++) any |= listed[i] != 0;
  if (!any) return false;
  std::fill(bias, bias + n, 0.f);
  for (int64_t i = first; i < last; i++) bias[i] = listed[i] * kLog2e;
  return true;
}

// A group of query columns of one head, and where its items and their partial results lie.
struct Task {
  int head;     // sequence * h + KV head
  int column;   // first query column
  int columns, group, chunks;
  int64_t rows_per_item, first_item, row_items, coded_items, items;  // items of rows, of codes, then those of means
  float* q;     // (chunks * group, dp)
  float* q_of_codes;  // likewise in plain order, null without codes
  float* part;  // per item: value sums (chunks * group, ep), then maxima and weight sums (chunks * group)
  int32_t* limits;  // (chunks * group) by rows of the arena, then by rows of codes
  int32_t limits_from, coded_limits_from;
};

struct Plan {
  std::vector<Source> sources, coded;
  std::vector<Entries> entries;
  std::vector<Task> tasks;
  std::vector<std::pair<int32_t, int32_t>> items;  // task, number within it
  std::vector<std::atomic<int64_t>> left;
  Scratch floats, ints;
};

// How far rows of the arena lie before the rows that they would be without codes, from row `first` on.
struct Shift {
  int64_t first = 0, by = 0;
  Shift(const CodedRows& coded, int64_t i) {
    if (coded.k) first = coded.first[i], by = coded.last[i] - coded.first[i];
  }
  int32_t limit(int64_t row) const { return static_cast<int32_t>(std::max<int64_t>({row - by, std::min(row, first), 0})); }
};

// Which rows of the arena and which codes are read where all of them, but the listed ones, are rows [0, sinks), [sealed, length).
Source uncoded(const Source& all, const Shift& shift) {
  const int64_t stop = shift.first + shift.by, end = all.recent_from + all.recent, from = std::max(all.recent_from, stop);
  return {all.recent_from ? std::min(all.sinks, shift.first) : shift.first, 0, from - shift.by, end - from, nullptr};
}
Source coded(const Source& all, const Shift& shift) {
  const int64_t first = std::min(all.sinks, shift.first), from = std::max(all.recent_from, shift.first);
  return {all.sinks - first, all.listed, from, std::max<int64_t>(shift.first + shift.by - from, 0), all.list, first};
}

// Floats that the partial result of one item takes.
int64_t part_size(int64_t columns, int64_t ep) { return round_up(columns * (ep + 2), 16); }

// The kernels' maxima pass over NaN, so a query that holds one is told apart here: its output is NaN, as dense attention's is.
bool holds_nan(const float* q, int n) {
  bool found = false;
  for (int i = 0; i < n; i++) found |= !(q[i] - q[i] == 0);  // infinities count: their products are not numbers either
  return found;
}

void merge_task(const ScanArgs& p, const Kernels& kern, const Task& task, int dp, int ep) {
  thread_local Scratch memory;
  float* sum = memory.get<float>(2 * ep + p.e);  // of rows of numbers, and of codes, which are in another order
  float *sum_of_codes = sum + ep, *plain = sum_of_codes + ep;
  const int columns = task.chunks * task.group;
  const int64_t j = static_cast<int64_t>(p.g) * p.n_queries;
  for (int c = 0; c < task.columns; c++) {
    std::fill(sum, plain, 0.f);
    softmax_mass mass = softmax_mass::empty();
    for (int64_t i = 0; i < task.items; i++) {
      const float* block = task.part + i * part_size(columns, ep);
      const float* o = block + static_cast<int64_t>(c) * ep;
      float keep, take;
      mass.join({block[static_cast<int64_t>(columns) * ep + c], block[static_cast<int64_t>(columns) * (ep + 1) + c]}, keep, take);
      const bool of_codes = i >= task.row_items && i < task.row_items + task.coded_items;
      float *own = of_codes ? sum_of_codes : sum, *other = of_codes ? sum : sum_of_codes;
      for (int x = 0; x < ep; x++) own[x] = own[x] * keep + o[x] * take;
      if (task.coded_items && keep != 1)
        for (int x = 0; x < ep; x++) other[x] *= keep;
    }
    kern.unpack_values(p.type, sum, p.e, plain);
    if (task.coded_items) {
      if (p.coded.value_bits == 4) kern.rotate_back(sum_of_codes, p.e);
      for (int x = 0; x < p.e; x++) plain[x] += sum_of_codes[x];
    }
    const bool broken = task.items && holds_nan(task.q + static_cast<int64_t>(c) * dp, dp);
    const float inverse = broken ? NAN : mass.inverse();
    const int64_t at = task.head * j + task.column + c;
    with_type(p.q_type, [&](auto t) {
      using T = decltype(t);
      T* out = static_cast<T*>(p.out) + at * p.e;
      for (int x = 0; x < p.e; x++) out[x] = from_float<T>(plain[x] * inverse);
    });
    p.lse[at] = broken ? NAN : mass.lse();
  }
}

}  // namespace

void scan(const ScanArgs& p, const Ints& sinks, const Ints& sealed, const Ints& lengths) {
  const Kernels& kern = kernels();
  const int dp = static_cast<int>(round_up(p.d, kern.round)), ep = static_cast<int>(round_up(p.e, kern.round));
  const int64_t j = static_cast<int64_t>(p.g) * p.n_queries, heads = static_cast<int64_t>(p.b) * p.h;
  thread_local Plan plan;
  plan.sources.clear();
  plan.coded.clear();
  plan.entries.clear();
  plan.tasks.clear();
  plan.items.clear();
  size_t floats = 0, ints = 0;
  for (int64_t head = 0; head < heads; head++) {
    const int64_t i = head / p.h;
    const int64_t listed = p.rows ? p.counts[head] : 0;
    if (listed < 0 || listed > p.t) throw std::out_of_range("scan: counts: a count lies outside [0, " + std::to_string(p.t) + "]");
    Source s{sinks[i], listed, sealed[i], lengths[i] - sealed[i], p.rows ? p.rows + head * p.t : nullptr};
    const Shift shift(p.coded, i);
    plan.sources.push_back(p.coded.k ? uncoded(s, shift) : s);
    plan.coded.push_back(p.coded.k ? coded(s, shift) : Source{});
    Entries tail{p.tail.runs ? p.tail.runs + head * p.tail.x : nullptr, p.tail.runs ? p.tail.counts[head] : 0};
    if (tail.count < 0 || tail.count > p.tail.x)
      throw std::out_of_range("scan: tail.counts: a count lies outside [0, " + std::to_string(p.tail.x) + "]");
    plan.entries.push_back(tail);
    const int64_t per_item = std::clamp(round_up(s.total() * p.h / 64, 16), kLeastRows, kMostRows);
    for (int64_t column = 0; column < j; column += kScanColumns) {
      Task t{};
      t.head = static_cast<int>(head);
      t.column = static_cast<int>(column);
      t.columns = static_cast<int>(std::min<int64_t>(kScanColumns, j - column));
      t.chunks = (t.columns + kern.lanes - 1) / kern.lanes;
      t.group = 1;
      while (t.group * t.chunks < t.columns) t.group *= 2;
      t.rows_per_item = per_item;
      t.row_items = (plan.sources.back().total() + per_item - 1) / per_item;
      t.coded_items = (plan.coded.back().total() + per_item - 1) / per_item;
      t.items = t.row_items + t.coded_items + (tail.count + kMostRows - 1) / kMostRows;
      t.first_item = static_cast<int64_t>(plan.items.size());
      for (int64_t k = 0; k < t.items; k++) plan.items.emplace_back(static_cast<int32_t>(plan.tasks.size()), static_cast<int32_t>(k));
      const size_t columns = static_cast<size_t>(t.chunks) * t.group;
      floats += round_up(columns * dp, 16) * (p.coded.k ? 2 : 1) + t.items * part_size(columns, ep);
      ints += 2 * columns;
      plan.tasks.push_back(t);
    }
  }
  const bool limited = p.causal && p.n_queries > 1;
  // The least place that is not seen by every query: of an arena a row, of a pool one in the order of reading.
  auto first_limited = [&](const Source& s, int head) { return (p.row ? s.total() : lengths[head / p.h]) - p.n_queries + 1; };
  float* memory = plan.floats.get<float>(floats + p.d);
  int32_t* limits = plan.ints.get<int32_t>(ints);
  float* row = memory + floats;
  if (plan.left.size() < plan.tasks.size()) plan.left = std::vector<std::atomic<int64_t>>(plan.tasks.size());
  for (size_t n = 0; n < plan.tasks.size(); n++) {
    Task& t = plan.tasks[n];
    const int columns = t.chunks * t.group;
    plan.left[n].store(t.items, std::memory_order_relaxed);
    t.q = memory;
    memory += round_up(static_cast<int64_t>(columns) * dp, 16);
    if (p.coded.k) {
      t.q_of_codes = memory;
      memory += round_up(static_cast<int64_t>(columns) * dp, 16);
    }
    t.part = memory;
    memory += t.items * part_size(columns, ep);
    t.limits = limits;
    limits += 2 * columns;
    const int64_t first_seen = first_limited(plan.sources[t.head], t.head);
    const Shift shift(p.coded, t.head / p.h);
    t.limits_from = shift.limit(first_seen);
    t.coded_limits_from = static_cast<int32_t>(std::max<int64_t>(first_seen, 0));
    for (int c = 0; c < columns; c++) {
      // Columns that only fill the last chunk up have a zero query and are never read.
      const int64_t limit = first_seen + (t.column + c) % p.n_queries;
      t.limits[c] = shift.limit(limit);
      t.limits[columns + c] = static_cast<int32_t>(std::max<int64_t>(limit, 0));
      float* plain = p.coded.k ? t.q_of_codes + static_cast<int64_t>(c) * dp : nullptr;
      if (c >= t.columns) {
        std::fill(t.q + static_cast<int64_t>(c) * dp, t.q + static_cast<int64_t>(c + 1) * dp, 0.f);
        if (plain) std::fill(plain, plain + dp, 0.f);
        continue;
      }
      with_type(p.q_type, [&](auto x) {
        using T = decltype(x);
        const T* q = static_cast<const T*>(p.q) + (t.head * j + t.column + c) * p.d;
        for (int i = 0; i < p.d; i++) row[i] = to_float(q[i]);
      });
      kern.pack_queries(p.type, row, p.d, dp, p.scale * kLog2e, t.q + static_cast<int64_t>(c) * dp);
      if (plain) kern.pack_queries(DType::f32, row, p.d, dp, p.scale * kLog2e, plain);
    }
    if (!t.items) merge_task(p, kern, t, dp, ep);
  }

  std::atomic<bool> fine{true};
  Plan& shared = plan;  // a thread_local named inside the lambda would be the worker's own
  pool().run(static_cast<int64_t>(plan.items.size()), [&](int64_t n) {
    const auto [number, k] = shared.items[n];
    const Task& t = shared.tasks[number];
    const int columns = t.chunks * t.group;
    alignas(64) int32_t rows[kMostRows + kScanPad];
    int32_t places[kMostRows];
    float bias[kMostRows];
    const bool of_rows = k < t.row_items, of_codes = !of_rows && k < t.row_items + t.coded_items;
    const Source& s = of_codes ? shared.coded[t.head] : shared.sources[t.head];
    const Entries& tail = shared.entries[t.head];
    const int64_t head = t.head, per_item = of_rows || of_codes ? t.rows_per_item : kMostRows;
    const int64_t from = (k - (of_rows ? 0 : of_codes ? t.row_items : t.row_items + t.coded_items)) * per_item;
    const int count = static_cast<int>(std::min(per_item, (of_rows || of_codes ? s.total() : tail.count) - from));
    ScanItem it{};
    if (of_codes    ? s.read(from, count, p.coded.last[head / p.h], rows)
        : of_rows   ? s.read(from, count, p.N, rows)
                    : tail.read(p.tail, head, from, count, rows, bias)) {
      const int64_t size = static_cast<int64_t>(size_of(p.type));
      const bool pool = of_rows && p.row;
      it.q = of_codes ? t.q_of_codes : t.q;
      it.k_row = pool ? p.row : p.d, it.v_row = pool ? p.row : p.e;
      if (of_codes) {
        it.k = p.coded.k + head * p.coded.N * code_size(p.d, 8);
        it.v = p.coded.v + head * p.coded.N * code_size(p.e, p.coded.value_bits);
      } else {
        const int64_t first = of_rows ? head * p.N : head * p.tail.M * p.tail.l, step = head % p.h * p.head_step;
        it.k = static_cast<const char*>(of_rows ? p.k : p.tail.k) + (pool ? step : first * p.d) * size;
        it.v = static_cast<const char*>(of_rows ? p.v : p.tail.v) + (pool ? step : first * p.e) * size;
      }
      it.d = p.d, it.e = p.e, it.dp = dp, it.ep = ep;
      it.rows = rows;
      it.n = count;
      const bool biased = of_rows || of_codes ? p.biases && read_biases(p.biases + head * p.t, s, from, count, bias) : true;
      it.bias = biased ? bias : nullptr;
      it.limits = !limited || !(of_rows || of_codes) ? nullptr : t.limits + (of_codes ? columns : 0);
      it.limits_from = of_codes ? t.coded_limits_from : t.limits_from;
      it.places = rows;
      if (pool && it.limits) {
        for (int i = 0; i < count; i++) places[i] = static_cast<int32_t>(from) + i;
        it.places = places;
      }
      it.group = t.group, it.chunks = t.chunks;
      it.o = t.part + k * part_size(columns, ep);
      it.m = it.o + static_cast<int64_t>(columns) * ep;
      it.l = it.m + columns;
      if (of_codes) kern.scan_codes(p.coded.value_bits, it);
      else kern.scan(p.type, it);
    } else {
      fine.store(false, std::memory_order_relaxed);
    }
    if (shared.left[number].fetch_sub(1, std::memory_order_acq_rel) == 1 && fine.load(std::memory_order_relaxed)) {
      merge_task(p, kern, t, dp, ep);
    }
  });
  if (!fine) throw std::out_of_range("scan: rows, tail: a row number lies outside [0, " + std::to_string(p.N) + "), or a run is empty or not there");
}

}  // namespace saap
