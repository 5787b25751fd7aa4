// From scores to rows: weighs the runs of each head, finds the weight at which the budget is spent, lists the rows.
//
// Weights are not sorted: a histogram over their bit patterns, in which a run counts with its length, finds the few runs among
// which the budget ends, and only those are put in order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"

namespace saap {
namespace {

// Order of preference as one number: the weight's bits (weights are not negative), the newer segment, the lower list.
uint64_t preference(float weight, int s, int l) {
  return static_cast<uint64_t>(float_bits(weight)) << 32 | static_cast<uint64_t>(s) << 16 | static_cast<uint64_t>(65535 - l);
}

struct Candidate {
  uint64_t order;
  int32_t end, length;
};

// The last run that gets rows, and how many of its rows it gets. Every run before it in order of preference is taken whole.
struct Cut {
  uint64_t order;
  int32_t rows;
};

// The plain way, for scores too far apart for single precision: everything relative to the largest single weight, in float64.
void run_weights_wide(const ProbeHead& p, float* w) {
  std::vector<double> sum(static_cast<size_t>(p.s) * p.l, 0.0);
  for (int j = 0; j < p.j; j++) {
    const float *z = p.z + static_cast<int64_t>(j) * p.l, *a = p.a + static_cast<int64_t>(j) * p.s;
    auto score = [&](int s, int l) { return static_cast<double>(z[l]) + (p.count_lists ? a[s] : 0.f); };
    auto length = [&](int s, int l) { return p.tables[static_cast<int64_t>(s) * (p.l + 1) + l + 1] - p.tables[static_cast<int64_t>(s) * (p.l + 1) + l]; };
    double top = -INFINITY, total = 0;
    for (int s = 0; s < p.s; s++)
      for (int l = 0; l < p.l; l++)
        if (!p.count_lists || length(s, l) > 0) top = std::max(top, score(s, l));
    for (int s = 0; s < (p.count_lists ? p.s : 1); s++)
      for (int l = 0; l < p.l; l++) total += (p.count_lists ? length(s, l) : 1) * std::exp(score(s, l) - top);
    for (int s = 0; s < p.s; s++)
      for (int l = 0; l < p.l && total > 0; l++) sum[static_cast<size_t>(s) * p.l + l] += p.share[j] * std::exp(score(s, l) - top) / total;
  }
  for (int s = 0; s < p.s; s++)
    for (int l = 0; l < p.lp; l++) {
      const bool run = l < p.l && p.tables[static_cast<int64_t>(s) * (p.l + 1) + l + 1] > p.tables[static_cast<int64_t>(s) * (p.l + 1) + l];
      const double weight = run ? sum[static_cast<size_t>(s) * p.l + l] : 0.0;
      // The histogram and the cut take a weight for a number: scores that are none (of a NaN query) weigh nothing.
      w[static_cast<int64_t>(s) * p.lp + l] = weight > 0 ? static_cast<float>(std::min(weight, 3e38)) : 0.f;
    }
}

void list_weights_wide(const ProbeHead& p, float* w) {
  std::vector<double> sum(p.l, 0.0);
  for (int j = 0; j < p.j; j++) {
    const float* z = p.z + static_cast<int64_t>(j) * p.l;
    std::vector<double> n(p.l, p.count_lists ? 0.0 : 1.0);
    for (int s = 0; s < p.s && p.count_lists; s++)
      for (int l = 0; l < p.l; l++) n[l] += p.tables[static_cast<int64_t>(s) * (p.l + 1) + l + 1] - p.tables[static_cast<int64_t>(s) * (p.l + 1) + l];
    double top = -INFINITY, total = 0;
    for (int l = 0; l < p.l; l++)
      if (n[l] > 0) top = std::max(top, static_cast<double>(z[l]));
    for (int l = 0; l < p.l; l++)
      if (n[l] > 0) total += n[l] * std::exp(z[l] - top);
    for (int l = 0; l < p.l; l++) sum[l] += total > 0 ? p.share[j] * std::exp(z[l] - top) / total : 0.0;
  }
  for (int l = 0; l < p.lp; l++) w[l] = l < p.l ? static_cast<float>(std::min(sum[l], 3e38)) : 0.f;
}

// The runs among which the budget ends, and the better ones, in row order; all of them together hold more than `budget` rows.
// `rest` becomes what is left for the runs of weight below `edge`.
void gather(const ProbeHead& p, const float* w, int64_t budget, std::vector<Candidate>& runs, float& edge, int64_t& rest) {
  constexpr int kBins = 2048, kShift = 20;  // exponent and the first bits of the fraction: an eighth of an octave
  thread_local std::vector<int32_t> places;
  int32_t bins[kBins] = {};
  for (int s = 0; s < p.s; s++) {
    const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
    const float* row = w + static_cast<int64_t>(s) * p.lp;
    for (int l = 0; l < p.l; l++) bins[float_bits(row[l]) >> kShift] += table[l + 1] - table[l];
  }
  int bin = kBins - 1;
  for (; bin > 0 && bins[bin] < budget; bin--) budget -= bins[bin];
  rest = budget;
  edge = bit_float(static_cast<uint32_t>(bin + 1) << kShift);
  const float least = bit_float(static_cast<uint32_t>(bin) << kShift);
  places.resize(p.l + 1);
  runs.clear();
  for (int s = 0; s < p.s; s++) {
    const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
    const float* row = w + static_cast<int64_t>(s) * p.lp;
    int found = 0;  // without a branch: which runs are good is anybody's guess
    for (int l = 0; l < p.l; l++) {
      places[found] = l;
      found += row[l] >= least;
    }
    for (int i = 0; i < found; i++) {
      const int l = places[i];
      if (table[l + 1] > table[l]) runs.push_back({preference(row[l], s, l), table[l + 1], table[l + 1] - table[l]});
    }
  }
}

// The run in which `budget` rows end when runs are taken in order of preference. Reorders them.
Cut find_cut(std::vector<Candidate>& few, int64_t budget) {
  auto better = [](const Candidate& x, const Candidate& y) { return x.order > y.order; };
  size_t from = 0, to = few.size();
  // Keep the half in which it lies: linear in the number of runs.
  while (to - from > 16) {
    const size_t middle = from + (to - from) / 2;
    std::nth_element(few.begin() + from, few.begin() + middle, few.begin() + to, better);
    int64_t upper = 0;
    for (size_t i = from; i < middle; i++) upper += few[i].length;
    if (upper >= budget) to = middle;
    else budget -= upper, from = middle;
  }
  std::sort(few.begin() + from, few.begin() + to, better);
  for (; from + 1 < to && few[from].length < budget; from++) budget -= few[from].length;
  return {few[from].order, static_cast<int32_t>(std::min<int64_t>(few[from].length, budget))};
}

int32_t* write_rows(int32_t first, int32_t n, int32_t* out) {
  for (int32_t i = 0; i < n; i++) out[i] = first + i;
  return out + n;
}

// nprobe 0. Returns the end of what it wrote.
int32_t* take_runs(const ProbeHead& p, float* w, int64_t total, int64_t budget, int32_t* out) {
  if (budget <= 0 || total <= 0) return out;
  if (total <= budget) {
    for (int s = 0; s < p.s; s++) {
      const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
      out = write_rows(table[0], table[p.l] - table[0], out);
    }
    return out;
  }
  if (!kernels().run_weights(p, w)) run_weights_wide(p, w);
  thread_local std::vector<Candidate> runs, few;
  float edge;
  int64_t rest;
  gather(p, w, budget, runs, edge, rest);
  few.clear();
  for (const Candidate& run : runs)
    if (run.order < preference(edge, 0, 65535)) few.push_back(run);
  const Cut cut = find_cut(few, rest);
  for (const Candidate& run : runs) {
    if (run.order < cut.order) continue;
    const int32_t n = run.order == cut.order ? cut.rows : run.length;
    out = write_rows(run.end - n, n, out);
  }
  return out;
}

// nprobe p. Returns the end of what it wrote.
int32_t* take_lists(const ProbeHead& p, float* w, int nprobe, int64_t budget, int32_t* out) {
  if (!kernels().list_weights(p, w)) list_weights_wide(p, w);
  thread_local std::vector<uint64_t> order;
  thread_local std::vector<int32_t> take;
  order.clear();
  for (int l = 0; l < p.l; l++) order.push_back(preference(w[l], 0, l));
  nprobe = std::min(nprobe, p.l);
  std::partial_sort(order.begin(), order.begin() + nprobe, order.end(), std::greater<>());
  take.assign(static_cast<size_t>(p.s) * p.l, 0);
  for (int i = 0; i < nprobe && budget > 0; i++) {
    const int l = 65535 - static_cast<int>(order[i] & 65535);
    for (int s = p.s - 1; s >= 0 && budget > 0; s--) {
      const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
      const int32_t n = static_cast<int32_t>(std::min<int64_t>(table[l + 1] - table[l], budget));
      take[static_cast<size_t>(s) * p.l + l] = n;
      budget -= n;
    }
  }
  for (int s = 0; s < p.s; s++)
    for (int l = 0; l < p.l; l++)
      if (const int32_t n = take[static_cast<size_t>(s) * p.l + l]) out = write_rows(p.tables[static_cast<int64_t>(s) * (p.l + 1) + l + 1] - n, n, out);
  return out;
}

// share (j): the sigmoid of the last of a's m columns, relative to the largest, for only the order of weights matters; 1 without.
void head_shares(const ProbeArgs& p, int64_t bh, float* share) {
  const bool known = p.m && p.count_lists;
  double top = -INFINITY;
  auto log_share = [&](int j) {
    const double c = p.a[(bh * p.j + j) * p.m + p.m - 1];
    return c < 0 ? c - std::log1p(std::exp(c)) : -std::log1p(std::exp(-c));
  };
  for (int j = 0; j < p.j && known; j++) top = std::max(top, log_share(j));
  for (int j = 0; j < p.j; j++) {
    const double relative = known && std::isfinite(top) ? std::exp(log_share(j) - top) : 1.0;
    share[j] = relative > 0 ? static_cast<float>(relative) : 0.f;  // 0 also for NaN
  }
}

const int32_t* table_of(const ProbeArgs& p, int64_t bh, int s) { return p.tables + (bh * p.S + s) * (static_cast<int64_t>(p.l) + 1); }

int64_t total_of(const ProbeArgs& p, int64_t bh, int64_t segments) {
  int64_t total = 0;
  for (int s = 0; s < segments; s++) total += table_of(p, bh, s)[p.l] - table_of(p, bh, s)[0];
  return total;
}

// Offsets that fall would make a run of negative length, and the rows written overrun their bound.
bool ordered(const int32_t* table, int l) {
  int32_t falls = 0;
  for (int i = 0; i < l; i++) falls |= table[i + 1] < table[i];
  return !falls;
}

}  // namespace

int64_t probe_bound(const ProbeArgs& p, const Ints& num_segments, const Ints& budgets) {
  int64_t most = 0;
  for (int64_t bh = 0; bh < static_cast<int64_t>(p.b) * p.h; bh++)
    most = std::max(most, std::min(budgets[bh / p.h], total_of(p, bh, num_segments[bh / p.h])));
  return most;
}

int64_t probe(const ProbeArgs& p, const Ints& num_segments, const Ints& budgets, int64_t bound, int32_t* rows, int32_t* counts) {
  const int64_t heads = static_cast<int64_t>(p.b) * p.h;
  std::atomic<bool> fine{true};
  pool().run(heads, [&](int64_t bh) {
    thread_local Scratch memory;
    const int64_t i = bh / p.h;
    ProbeHead head{};
    head.j = p.j, head.l = p.l, head.lp = (p.l + kPanel - 1) / kPanel * kPanel;
    head.s = static_cast<int>(num_segments[i]);
    head.z = p.z + bh * p.j * p.l;
    head.tables = table_of(p, bh, 0);
    head.count_lists = p.count_lists;
    counts[bh] = 0;
    for (int s = 0; s < head.s; s++)
      if (!ordered(table_of(p, bh, s), p.l)) return fine.store(false);
    const int64_t runs = static_cast<int64_t>(head.s) * head.lp, e_size = static_cast<int64_t>(p.j) * head.lp;
    float* w = memory.get<float>(std::max<int64_t>(runs, head.lp) + e_size + 2 * static_cast<int64_t>(p.j) * head.s + p.j);
    head.e = w + std::max<int64_t>(runs, head.lp);
    head.c = head.e + e_size;
    float* interpolated = head.c + static_cast<int64_t>(p.j) * head.s;
    head.a = interpolated;
    float* share = interpolated + static_cast<int64_t>(p.j) * head.s;
    head_shares(p, bh, share);
    head.share = share;
    const int knots = p.m - 1;
    for (int s = 0; s < head.s; s++) {
      const float place = knots > 0 ? std::clamp(p.knots[i * p.S + s], 0.f, static_cast<float>(knots - 1)) : 0.f;
      const int low = static_cast<int>(place), high = std::min(low + 1, knots - 1);
      for (int j = 0; j < p.j; j++) {
        const float* a = p.a + (bh * p.j + j) * p.m;
        interpolated[static_cast<int64_t>(j) * head.s + s] = knots > 0 ? a[low] + (place - static_cast<float>(low)) * (a[high] - a[low]) : 0.f;
      }
    }
    int32_t* out = rows + bh * bound;
    int32_t* end = p.nprobe ? take_lists(head, w, p.nprobe, budgets[i], out)
                            : take_runs(head, w, total_of(p, bh, head.s), budgets[i], out);
    counts[bh] = static_cast<int32_t>(end - out);
  });
  if (!fine) throw std::out_of_range("probe: tables: the offsets of a segment are not ascending");
  int64_t t = 0;
  for (int64_t bh = 0; bh < heads; bh++) t = std::max<int64_t>(t, counts[bh]);
  for (int64_t bh = 0; bh < heads; bh++) {
    int32_t* to = rows + bh * t;
    if (t != bound) std::memmove(to, rows + bh * bound, sizeof(int32_t) * counts[bh]);
    std::fill(to + counts[bh], to + t, -1);
  }
  return t;
}

}  // namespace saap
