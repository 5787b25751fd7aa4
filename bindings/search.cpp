// A decode step in one call: route, probe and scan, with nothing between them but the place of each segment on the knots.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "ops.h"
#include "pool.h"
#include "scratch.h"

namespace saap {

void search(const SearchPlan& plan, const SearchCall& call, ProbeOut& rows, ProbeOut& tail) {
  thread_local Scratch memory;
  ProbeArgs p = plan.probe;
  ScanArgs s = plan.scan;
  const int64_t heads = static_cast<int64_t>(p.b) * p.h, segments = static_cast<int64_t>(p.b) * p.S;
  p.j = call.g * call.n_queries;
  float* z = memory.get<float>(static_cast<size_t>(heads * p.j * (p.l + p.m) + segments));
  float* a = z + heads * p.j * p.l;
  float* knots = a + heads * p.j * p.m;
  const double last = std::max(0, p.m - 2);  // of the m columns the first m - 1 are knots
  for (int64_t i = 0; i < segments; i++) {
    const double distance = static_cast<double>(call.ends[i / p.S] - 1) - plan.centres[i];
    knots[i] = static_cast<float>(std::clamp(std::log2(std::max(distance, 1.0)) - plan.first_knot, 0.0, last));
  }
  p.z = z, p.a = a, p.knots = knots;
  // Whoever routes the last part of a head selects for it: nobody waits for other heads.
  const int64_t items = route_items(*plan.router, p.b, call.g, call.n_queries);
  thread_local std::vector<std::atomic<int64_t>> parts_left;
  if (static_cast<int64_t>(parts_left.size()) < heads) parts_left = std::vector<std::atomic<int64_t>>(heads);
  for (int64_t head = 0; head < heads; head++) parts_left[head].store(items, std::memory_order_relaxed);
  std::atomic<int64_t>* left = parts_left.data();
  std::atomic<bool> fine{true};
  pool().run(items * heads, [&](int64_t item) {
    route_item(*plan.router, call.q_type, call.q, call.g, call.n_queries, call.angles, z, a, items, item);
    const int64_t head = item / items;
    if (left[head].fetch_sub(1, std::memory_order_acq_rel) == 1 && !probe_head(p, plan.num_segments, plan.means, rows, tail, head))
      fine.store(false);
  }, Pool::Next::kSoon);
  finish_probe(p, fine, rows, tail);
  s.q = call.q, s.q_type = call.q_type, s.g = call.g, s.n_queries = call.n_queries;
  s.rows = rows.width ? rows.numbers : nullptr, s.counts = rows.counts, s.t = rows.width;
  s.biases = rows.biases;
  s.out = call.out, s.lse = call.lse;
  if (p.entries) s.tail.runs = tail.width ? tail.numbers : nullptr, s.tail.counts = tail.counts, s.tail.x = tail.width;
  scan(s, plan.sinks, plan.sealed, call.lengths);
}

}  // namespace saap
