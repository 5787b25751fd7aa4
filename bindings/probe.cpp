// From scores to rows: weighs the runs of each head, finds the weight at which the budget is spent or enough attention is read,
// lists the rows, and the best runs besides that are read through their means.
//
// Weights are not sorted: a histogram over their bit patterns, in which a run counts with its length and its mass, finds the few
// runs among which the budget ends, and only those are put in order.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <span>
#include <stdexcept>
#include <utility>
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
constexpr uint64_t kNoRun = UINT64_MAX;  // before every run in order of preference

// What is left to take while runs are taken: rows, and attention beyond what may stay unread, in the units of the weights.
struct Room {
  int64_t rows;
  double mass;
  bool ends_with(int64_t more_rows, double more_mass) const { return more_rows >= rows || mass - more_mass <= 0; }
  void take(int64_t more_rows, double more_mass) { rows -= more_rows, mass -= more_mass; }
};

float weight_of(const Candidate& run) { return bit_float(static_cast<uint32_t>(run.order >> 32)); }
double mass_of(const Candidate& run) { return static_cast<double>(weight_of(run)) * run.length; }

// The plain way, for scores too far apart for single precision: everything relative to the largest single weight, in float64.
void run_weights_wide(const ProbeHead& p, float* w) {
  std::vector<double> sum(static_cast<size_t>(p.s) * p.l, 0.0);
  for (int j = 0; j < p.j; j++) {
    const float *z = p.z + static_cast<int64_t>(j) * p.l, *a = p.a + static_cast<int64_t>(j) * p.s;
    auto score = [&](int s, int l) { return static_cast<double>(z[l]) + (p.size_weighted ? a[s] : 0.f); };
    auto length = [&](int s, int l) { return p.tables[static_cast<int64_t>(s) * (p.l + 1) + l + 1] - p.tables[static_cast<int64_t>(s) * (p.l + 1) + l]; };
    double top = -INFINITY, total = 0;
    for (int s = 0; s < p.s; s++)
      for (int l = 0; l < p.l; l++)
        if (!p.size_weighted || length(s, l) > 0) top = std::max(top, score(s, l));
    for (int s = 0; s < (p.size_weighted ? p.s : 1); s++)
      for (int l = 0; l < p.l; l++) total += (p.size_weighted ? length(s, l) : 1) * std::exp(score(s, l) - top);
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
    std::vector<double> n(p.l, p.size_weighted ? 0.0 : 1.0);
    for (int s = 0; s < p.s && p.size_weighted; s++)
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

constexpr int kBins = 2048, kShift = 20;  // exponent and the first bits of the fraction: an eighth of an octave
// The edges of bins lie beside the fractions at which equal runs have their weights, see reference.weight_bins.
constexpr uint32_t kOffset = 0x5A5A5;

int bin_of(float weight) { return static_cast<int>((float_bits(weight) + kOffset) >> kShift); }
float edge_of(int bin) { return bin > 0 ? bit_float((static_cast<uint32_t>(bin) << kShift) - kOffset) : 0.f; }

// f(number, s, l, rows) for runs s * lp + l, ascending, but for those of no rows and what fills the last panel of lists up.
template <class F>
void each_run(const ProbeHead& p, std::span<const int32_t> runs, F&& f) {
  const int32_t* table = p.tables;
  int s = 0, first = 0;
  for (int32_t run : runs) {
    for (; run - first >= p.lp; s++) first += p.lp, table += p.l + 1;
    const int l = run - first;
    if (l < p.l && table[l + 1] > table[l]) f(run, s, l, table + l);
  }
}

using Candidates = std::span<Candidate>;  // of this thread, until it gathers again

// These runs, in row order, but for those of no rows.
Candidates candidates(const ProbeHead& p, const float* w, std::span<const int32_t> some) {
  thread_local Scratch memory;
  Candidate* const first = memory.get<Candidate>(some.size());
  Candidate* last = first;
  each_run(p, some, [&](int run, int s, int l, const int32_t* at) { *last++ = {preference(w[run], s, l), at[1], at[1] - at[0]}; });
  return {first, last};
}

// Runs that are at least as heavy as the edge of some bin, and their rows by weight, where those have `rows` rows or more. Returns
// the highest bin in use, or 0, if no such edge was guessed. The guess counts some of the runs, and no result depends on it.
int guess_heavy(const ProbeHead& p, const float* w, int64_t rows, std::vector<int32_t>& numbers, Candidates& runs, int32_t* bins) {
  constexpr int kSome = 8, kLeastRuns = 2048;
  const int all = p.s * p.lp;
  if (all < kLeastRuns || rows <= 0) return 0;
  std::fill(bins, bins + kBins, 0);
  int bin = 0;
  for (int s = 0; s < p.s; s++) {  // other lists in every segment
    const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
    for (int from = s % kSome * kPanel; from < p.l; from += kSome * kPanel)
      for (int l = from; l < std::min(from + kPanel, p.l); l++) {
        const int of_run = bin_of(w[s * p.lp + l]);
        bins[of_run] += table[l + 1] - table[l];
        bin = std::max(bin, of_run);
      }
  }
  const int64_t enough = (rows + rows / 2) / kSome + 1;
  for (int64_t sum = bins[bin]; sum < enough && bin > 0;) sum += bins[--bin];
  if (bin <= 0) return 0;
  const size_t found = static_cast<size_t>(kernels().heavy_runs(w, all, edge_of(bin), numbers.data()));
  runs = candidates(p, w, {numbers.data(), found});
  std::fill(bins, bins + kBins, 0);
  int64_t sum = 0;
  int top = 0;
  for (const Candidate& run : runs) {
    bin = bin_of(weight_of(run));
    bins[bin] += run.length;
    sum += run.length;
    top = std::max(top, bin);
  }
  return sum >= rows ? top : 0;
}

// The runs among which the room ends, and the better ones, in row order. `room` becomes what is left for those of weight below
// `edge`. `allowed` : mass that may stay unread, used if Enough. False, with no runs, if no more than that is there at all.
// bins (kBins): rows of all runs by weight, or null, if nobody asks for them.
template <bool Enough>
bool gather(const ProbeHead& p, const float* w, double allowed, Room& room, Candidates& runs, float& edge, int32_t* bins) {
  thread_local std::vector<int32_t> numbers;
  if (numbers.size() < static_cast<size_t>(p.s) * p.lp + kFindPad) numbers.resize(static_cast<size_t>(p.s) * p.lp + kFindPad);
  int32_t own[kBins];
  double masses[Enough ? kBins : 1] = {};
  int bin = Enough || bins ? 0 : guess_heavy(p, w, room.rows, numbers, runs, own);
  const bool guessed = bin > 0;
  if (!bins) bins = own;
  if (!guessed) {
    bin = kBins - 1;
    std::fill(bins, bins + kBins, 0);
    for (int s = 0; s < p.s; s++) {
      const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
      const float* row = w + static_cast<int64_t>(s) * p.lp;
      for (int l = 0; l < p.l; l++) {
        const int32_t n = table[l + 1] - table[l];
        bins[bin_of(row[l])] += n;
        if (Enough) masses[bin_of(row[l])] += static_cast<double>(row[l]) * n;
      }
    }
  }
  room.mass = INFINITY;
  if (Enough) {
    room.mass = -allowed;
    for (double mass : masses) room.mass += mass;
    if (!(room.mass > 0)) return runs = {}, false;
  }
  for (; bin > 0 && !room.ends_with(bins[bin], masses[Enough ? bin : 0]); bin--) room.take(bins[bin], masses[Enough ? bin : 0]);
  edge = edge_of(bin + 1);
  const float least = edge_of(bin);
  if (guessed) {
    runs = {runs.begin(), std::remove_if(runs.begin(), runs.end(), [least](const Candidate& run) { return weight_of(run) < least; })};
  } else {
    const size_t found = static_cast<size_t>(kernels().heavy_runs(w, p.s * p.lp, least, numbers.data()));
    runs = candidates(p, w, {numbers.data(), found});
  }
  return true;
}

// The run in which the room ends when runs are taken in order of preference, the last one if it ends in none. Reorders them.
Cut find_cut(std::vector<Candidate>& few, Room room) {
  auto better = [](const Candidate& x, const Candidate& y) { return x.order > y.order; };
  size_t from = 0, to = few.size();
  // Keep the half in which it lies: linear in the number of runs.
  while (to - from > 16) {
    const size_t middle = from + (to - from) / 2;
    std::nth_element(few.begin() + from, few.begin() + middle, few.begin() + to, better);
    int64_t upper = 0;
    double mass = 0;
    for (size_t i = from; i < middle; i++) upper += few[i].length, mass += mass_of(few[i]);
    if (room.ends_with(upper, mass)) to = middle;
    else room.take(upper, mass), from = middle;
  }
  std::sort(few.begin() + from, few.begin() + to, better);
  for (; from + 1 < to && !room.ends_with(few[from].length, mass_of(few[from])); from++) room.take(few[from].length, mass_of(few[from]));
  return {few[from].order, static_cast<int32_t>(std::min<int64_t>(few[from].length, room.rows))};
}

// stop: as far as may be written, over what is written later.
int32_t* write_rows(int32_t first, int32_t n, int32_t* out, const int32_t* stop = nullptr) {
  typedef int32_t four __attribute__((vector_size(16)));
  if (stop && stop - out >= n + 8) {
    four rows = first + four{0, 1, 2, 3};
    for (int32_t i = 0; i < n; i += 8, rows += 8) {
      const four more = rows + 4;
      std::memcpy(out + i, &rows, sizeof rows), std::memcpy(out + i + 4, &more, sizeof more);
    }
  } else {
    for (int32_t i = 0; i < n; i++) out[i] = first + i;
  }
  return out + n;
}

// The last run that gets rows when the best are taken until `budget` rows are, or the rest has no more mass than `allowed` (if
// Enough); kNoRun if none gets any. w : weights of the runs; runs : the better ones, in row order, and some that get none.
template <bool Enough>
Cut cut_best(const ProbeHead& p, const float* w, int64_t budget, double allowed, Candidates& runs, int32_t* bins) {
  thread_local std::vector<Candidate> few;
  float edge;
  Room room{budget, 0};
  if (!gather<Enough>(p, w, allowed, room, runs, edge, bins) || budget <= 0) return {kNoRun, 0};
  few.clear();
  for (const Candidate& run : runs)
    if (run.order < preference(edge, 0, 65535)) few.push_back(run);
  // Where masses were summed in another order than before, the room may not end in any run: then all are taken.
  return few.empty() ? Cut{0, 0} : find_cut(few, room);
}

// Writes the rows of the runs before the cut and moves `out` to the end of them, `stop` at most; returns the last run, in order of
// preference, that got rows.
template <bool Enough>
uint64_t take_best(const ProbeHead& p, const float* w, int64_t budget, double allowed, int32_t*& out, const int32_t* stop) {
  Candidates runs;
  const Cut cut = cut_best<Enough>(p, w, budget, allowed, runs, nullptr);
  if (cut.order == kNoRun) return kNoRun;
  for (const Candidate& run : runs) {
    if (run.order < cut.order) continue;
    const int32_t n = run.order == cut.order ? cut.rows : run.length;
    out = write_rows(run.end - n, n, out, stop);
  }
  return cut.order;
}

// Probabilities are whole parts of kOne: see reference.inclusion.
constexpr int kOneBits = 20;
constexpr int64_t kOne = int64_t(1) << kOneBits;

constexpr int kPowers = 32 * (kOneBits + 1);  // steps of a thirty-second of an octave after which nothing is left

// 2^(-steps / 32) in parts of kOne.
int64_t power_of(int64_t steps) {
  static const std::array<int64_t, 32> powers = [] {
    std::array<int64_t, 32> table;
    for (int i = 0; i < 32; i++) table[i] = std::llrint(kOne * std::exp2(i / 32.0));
    return table;
  }();
  return powers[-steps & 31] >> std::min<int64_t>(62, (steps + 31) / 32);
}

// Probability of inclusion of a row of each bin (kBins), proportional to weight ** (exponent / 4) and `rows` in all at most. bins:
// the rows there are. See reference.inclusion.
void inclusion(const int32_t* bins, int64_t rows, int exponent, int32_t* probability) {
  std::fill(probability, probability + kBins, 0);
  struct Filled {
    int bin;
    int32_t rows;
    double total;  // of this bin and all below it, about
  };
  thread_local std::vector<Filled> filled;  // falling
  filled.clear();
  for (int bin = kBins - 1; bin >= 0; bin--)
    if (bins[bin] > 0) filled.push_back({bin, bins[bin], 0});
  int64_t powers[kPowers + 1];  // of the distance in bins, up to the first that is 0
  int reach = 0;
  while ((powers[reach] = power_of(static_cast<int64_t>(exponent) * reach))) reach++;
  double below = 0;
  for (size_t i = filled.size(); i-- > 0;) {
    const int gap = i + 1 < filled.size() ? filled[i].bin - filled[i + 1].bin : 0;
    below = filled[i].total = filled[i].rows + below * (gap < reach ? static_cast<double>(powers[gap]) / kOne : 0.0);
  }
  for (size_t i = 0; i < filled.size(); i++) {
    // Where it is plain that all rows of this bin are read for certain, the exact sum need not be asked.
    if (!(static_cast<double>(rows) > filled[i].total * 1.001 + 2)) {
      int64_t total = 0;
      size_t last = i;
      for (; last < filled.size() && filled[i].bin - filled[last].bin < reach; last++)
        total += powers[filled[i].bin - filled[last].bin] * filled[last].rows;
      if (rows * kOne < total) {
        for (size_t k = i; k < last; k++) {
          const int64_t term = powers[filled[i].bin - filled[k].bin];
          probability[filled[k].bin] = static_cast<int32_t>(term * rows * kOne / total);
        }
        return;
      }
    }
    probability[filled[i].bin] = kOne;
    rows -= filled[i].rows;
  }
}

// What one head reads of its budget as a sample.
struct Sampled {
  int64_t rows;
  int exponent;
  float cap;
};

// take_best of budget - sampled.rows, and a sample of what is left: see reference.weighted_probe. Moves out and biases to the ends of
// what it wrote. There are more than `budget` rows.
void take_sampled(const ProbeHead& p, const float* w, int64_t budget, const Sampled& sampled, int32_t*& out, float*& biases) {
  Candidates runs;
  int32_t bins[kBins], probability[kBins];
  float bias[kBins];
  const Cut cut = cut_best<false>(p, w, budget - sampled.rows, 0, runs, bins);
  for (const Candidate& run : runs) {
    const int bin = bin_of(weight_of(run));
    if (run.order >= cut.order) bins[bin] -= run.order == cut.order ? cut.rows : run.length;
  }
  inclusion(bins, sampled.rows, sampled.exponent, probability);
  for (int bin = 0; bin < kBins; bin++)
    if (probability[bin]) bias[bin] = std::min(static_cast<float>(std::log(static_cast<double>(kOne) / probability[bin])), sampled.cap);
  // Which runs have rows to read is anybody's guess, so they are listed without a branch.
  struct Read {
    int32_t first, rest, whole;  // rows of the run before those that are read for certain, and these
    int32_t bin;
    int64_t place;
  };
  thread_local std::vector<Read> reads;
  reads.resize(p.l + 1);
  const uint32_t cut_weight = static_cast<uint32_t>(cut.order >> 32);
  int64_t place = kOne / 2;
  for (int s = 0; s < p.s; s++) {
    const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
    const float* row = w + static_cast<int64_t>(s) * p.lp;
    int found = 0;
    for (int l = 0; l < p.l; l++) {
      const int32_t n = table[l + 1] - table[l];
      const uint32_t weight = float_bits(row[l]);
      int32_t whole = weight > cut_weight ? n : 0;
      if (weight == cut_weight) {
        const uint64_t order = preference(row[l], s, l);
        whole = order > cut.order ? n : order == cut.order ? cut.rows : 0;
      }
      const int bin = bin_of(row[l]);
      const int64_t end = place + static_cast<int64_t>(probability[bin]) * (n - whole);
      reads[found] = {table[l], n - whole, whole, bin, place};
      found += ((end >> kOneBits) > (place >> kOneBits)) | (whole > 0);
      place = end;
    }
    for (int i = 0; i < found; i++) {
      const Read& run = reads[i];
      const int64_t each = probability[run.bin], from = run.place & (kOne - 1), marks = (from + each * run.rest) >> kOneBits;
      if (marks == run.rest) {  // all of them, or one of one
        out = write_rows(run.first, run.rest, out);
      } else {
        // The k-th mark lies in row ceil((k * kOne - from) / each) - 1: a quotient of doubles, put right where it was rounded up.
        const double inverse = 1.0 / static_cast<double>(each);
        for (int64_t k = 1; k <= marks; k++) {
          const int64_t x = k * kOne - from + each - 1;
          int64_t q = static_cast<int64_t>(static_cast<double>(x) * inverse);
          q -= q * each > x;
          q += (q + 1) * each <= x;
          *out++ = run.first + static_cast<int32_t>(q - 1);
        }
      }
      biases = std::fill_n(biases, marks, bias[run.bin]);
      out = write_rows(run.first + run.rest, run.whole, out);
      biases = std::fill_n(biases, run.whole, 0.f);
    }
  }
}

// Numbers s * l + list of up to `entries` runs of the first `means` segments that come after `last` in order of preference, those
// of most mass. Returns the end of what it wrote.
int32_t* take_tail(const ProbeHead& p, const float* w, uint64_t last, int means, int64_t entries, int32_t* out) {
  thread_local std::vector<uint32_t> masses;  // (means, l) bits of the mass of an unread run, plus one; 0 for others
  thread_local std::vector<uint64_t> few;
  thread_local std::vector<int32_t> places;
  if (entries <= 0) return out;
  const size_t runs = static_cast<size_t>(means) * p.l;
  masses.resize(runs);
  places.resize(runs + 1);
  const uint32_t last_weight = static_cast<uint32_t>(last >> 32);
  for (int s = 0; s < means; s++) {
    const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
    const float* row = w + static_cast<int64_t>(s) * p.lp;
    uint32_t* mass = masses.data() + static_cast<size_t>(s) * p.l;
    // Of runs as heavy as the last one, those of older segments, or of its own and higher lists, come after it.
    const int last_segment = static_cast<int>(last >> 16 & 65535), last_list = 65535 - static_cast<int>(last & 65535);
    const int first_equal = s < last_segment ? 0 : s > last_segment ? p.l : last_list + 1;
    for (int l = 0; l < p.l; l++) {
      const int32_t n = table[l + 1] - table[l];
      const uint32_t weight = float_bits(row[l]);
      const bool open = (n > 0) & ((weight < last_weight) | ((weight == last_weight) & (l >= first_equal)));
      mass[l] = open ? float_bits(row[l] * static_cast<float>(n)) + 1 : 0;
    }
  }
  int32_t bins[kBins] = {};
  int64_t unread = 0;
  for (size_t i = 0; i < runs; i++) bins[masses[i] >> kShift]++, unread += masses[i] != 0;
  auto order = [&](size_t i) { return preference(bit_float(masses[i]), static_cast<int>(i / p.l), static_cast<int>(i % p.l)); };
  uint64_t least = 0;
  uint32_t from = 1, past = 0;  // masses that are sure to be taken start at `past`, those among which it ends at `from`
  if (unread > entries) {
    int bin = kBins - 1;
    for (; bin > 0 && bins[bin] < entries; bin--) entries -= bins[bin];
    from = std::max(1u, static_cast<uint32_t>(bin) << kShift), past = static_cast<uint32_t>(bin + 1) << kShift;
    few.clear();
    for (size_t i = 0; i < runs; i++)
      if (masses[i] - from < past - from) few.push_back(order(i));
    std::nth_element(few.begin(), few.begin() + (entries - 1), few.end(), std::greater<>());
    least = few[entries - 1];
  }
  int64_t found = 0;  // without a branch, as in gather
  for (size_t i = 0; i < runs; i++) {
    places[found] = static_cast<int32_t>(i);
    found += masses[i] >= from;
  }
  for (int64_t i = 0; i < found; i++)
    if (masses[places[i]] >= past || order(places[i]) >= least) *out++ = places[i];
  return out;
}

// What one head may take, nprobe 0. allowed: mass that may stay unread, in the units of the weights; negative: no such limit.
struct Limits {
  int64_t rows;
  double allowed;
  int64_t entries;
  int means;
  Sampled sampled;
};

// nprobe 0. Moves `out` and `tail` to the ends of what it wrote. biases: of the rows, null where nothing is sampled.
void take_runs(const ProbeHead& p, float* w, int64_t total, const Limits& most, int32_t*& out, int32_t*& tail, float* biases) {
  const bool enough = most.allowed >= 0;
  if (total <= 0 || (most.rows <= 0 && most.entries <= 0)) return;
  if (total <= most.rows && !enough) {
    for (int s = 0; s < p.s; s++) {
      const int32_t* table = p.tables + static_cast<int64_t>(s) * (p.l + 1);
      out = write_rows(table[0], table[p.l] - table[0], out);
    }
    if (biases) std::fill_n(biases, total, 0.f);
    return;
  }
  if (!kernels().run_weights(p, w)) run_weights_wide(p, w);
  uint64_t last = kNoRun;
  if (most.sampled.rows > 0) return take_sampled(p, w, most.rows, most.sampled, out, biases);
  if (biases) std::fill_n(biases, most.rows, 0.f);
  const int32_t* stop = out + std::min(most.rows, total);
  if (most.rows > 0) last = enough ? take_best<true>(p, w, most.rows, most.allowed, out, stop) : take_best<false>(p, w, most.rows, 0, out, stop);
  tail = take_tail(p, w, last, most.means, most.entries, tail);
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

// share (j): the sigmoid of the last of a's m columns, relative to the largest, for mostly only the order of weights matters; 1
// without. Returns the log of the largest. as_they_are: not relative to it, unless nothing of them would be left.
double head_shares(const ProbeArgs& p, int64_t bh, float* share, bool as_they_are) {
  const bool known = p.m && p.size_weighted;
  double top = -INFINITY;
  auto log_share = [&](int j) {
    const double c = p.a[(bh * p.j + j) * p.m + p.m - 1];
    return c < 0 ? c - std::log1p(std::exp(c)) : -std::log1p(std::exp(-c));
  };
  for (int j = 0; j < p.j && known; j++) top = std::max(top, log_share(j));
  if (as_they_are && top > -50) top = 0;
  for (int j = 0; j < p.j; j++) {
    const double relative = known && std::isfinite(top) ? std::exp(log_share(j) - top) : 1.0;
    share[j] = relative > 0 ? static_cast<float>(relative) : 0.f;  // 0 also for NaN
  }
  return known ? top : 0.0;
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

int64_t probe_bound(const ProbeArgs& p, const Ints& num_segments) {
  int64_t most = 0;
  for (int64_t bh = 0; bh < static_cast<int64_t>(p.b) * p.h; bh++)
    most = std::max(most, std::min<int64_t>(p.budgets[bh], total_of(p, bh, num_segments[bh / p.h])));
  return most;
}

namespace {

void pack(ProbeOut& out, int64_t heads) {
  for (int64_t bh = 0; bh < heads; bh++) out.width = std::max<int64_t>(out.width, out.counts[bh]);
  for (int64_t bh = 0; bh < heads; bh++) {
    int32_t* to = out.numbers + bh * out.width;
    if (out.width != out.bound) std::memmove(to, out.numbers + bh * out.bound, sizeof(int32_t) * out.counts[bh]);
    if (out.biases && out.width != out.bound)
      std::memmove(out.biases + bh * out.width, out.biases + bh * out.bound, sizeof(float) * out.counts[bh]);
    std::fill(to + out.counts[bh], to + out.width, -1);
  }
}

}  // namespace

bool probe_head(const ProbeArgs& p, const Ints& num_segments, const Ints& means, const ProbeOut& rows, const ProbeOut& tail, int64_t bh) {
  thread_local Scratch memory;
  const int64_t i = bh / p.h;
  ProbeHead head{};
  head.j = p.j, head.l = p.l, head.lp = (p.l + kPanel - 1) / kPanel * kPanel;
  head.s = static_cast<int>(num_segments[i]);
  head.z = p.z + bh * p.j * p.l;
  head.tables = table_of(p, bh, 0);
  head.size_weighted = p.size_weighted;
  rows.counts[bh] = 0;
  if (p.entries) tail.counts[bh] = 0;
  for (int s = 0; s < head.s; s++)
    if (!ordered(table_of(p, bh, s), p.l)) return false;
  const int64_t total = total_of(p, bh, head.s);
  if (std::min<int64_t>(p.budgets[bh], total) > rows.bound) return false;
  const int64_t runs = static_cast<int64_t>(head.s) * head.lp, e_size = static_cast<int64_t>(p.j) * head.lp;
  float* w = memory.get<float>(std::max<int64_t>(runs, head.lp) + e_size + 2 * static_cast<int64_t>(p.j) * head.s + p.j);
  head.e = w + std::max<int64_t>(runs, head.lp);
  head.c = head.e + e_size;
  float* interpolated = head.c + static_cast<int64_t>(p.j) * head.s;
  head.a = interpolated;
  float* share = interpolated + static_cast<int64_t>(p.j) * head.s;
  const double log_share = head_shares(p, bh, share, p.sampled && p.sampled[bh] > 0);
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
  int32_t *const out = rows.numbers + bh * rows.bound, *end = out;
  if (p.nprobe) {
    end = take_lists(head, w, p.nprobe, p.budgets[bh], out);
  } else {
    Limits most{p.budgets[bh], -1, 0, 0, {}};
    if (p.sampled) most.sampled = {std::min(p.sampled[bh], p.budgets[bh]), p.exponents[bh % p.h], p.caps[bh % p.h]};
    // Shares beyond float64 let nothing be read: what they say lies outside sinks and window is nothing.
    if (p.unread_mass) most.allowed = std::isfinite(log_share) ? static_cast<double>(p.unread_mass[bh % p.h]) * p.j * std::exp(-log_share) : INFINITY;
    if (p.entries) most.entries = p.entries[bh], most.means = static_cast<int>(means[i]);
    int32_t *const tail_out = tail.numbers + bh * tail.bound, *tail_end = tail_out;
    take_runs(head, w, total, most, end, tail_end, p.sampled ? rows.biases + bh * rows.bound : nullptr);
    if (p.entries) tail.counts[bh] = static_cast<int32_t>(tail_end - tail_out);
  }
  rows.counts[bh] = static_cast<int32_t>(end - out);
  return true;
}

void finish_probe(const ProbeArgs& p, bool fine, ProbeOut& rows, ProbeOut& tail) {
  const int64_t heads = static_cast<int64_t>(p.b) * p.h;
  if (!fine) throw std::out_of_range("probe: tables: the offsets of a segment are not ascending, or hold more rows than they did");
  pack(rows, heads);
  if (p.entries) pack(tail, heads);
}

void probe(const ProbeArgs& p, const Ints& num_segments, const Ints& means, ProbeOut& rows, ProbeOut& tail) {
  std::atomic<bool> fine{true};
  pool().run(static_cast<int64_t>(p.b) * p.h, [&](int64_t head) {
    if (!probe_head(p, num_segments, means, rows, tail, head)) fine.store(false);
  }, Pool::Next::kSoon);
  finish_probe(p, fine, rows, tail);
}

}  // namespace saap
