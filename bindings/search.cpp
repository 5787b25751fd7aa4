// A decode step in one call: route, probe and scan, with nothing between them but the place of each segment on the knots.
#include <algorithm>
#include <cmath>

#include "ops.h"
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
  route(*plan.router, call.q_type, call.q, p.b, call.g, call.n_queries, call.angles, z, a);
  p.z = z, p.a = a, p.knots = knots;
  probe(p, plan.num_segments, plan.means, rows, tail);
  s.q = call.q, s.q_type = call.q_type, s.g = call.g, s.n_queries = call.n_queries;
  s.rows = rows.width ? rows.numbers : nullptr, s.counts = rows.counts, s.t = rows.width;
  s.biases = rows.biases;
  s.out = call.out, s.lse = call.lse;
  if (p.entries) s.tail.runs = tail.width ? tail.numbers : nullptr, s.tail.counts = tail.counts, s.tail.x = tail.width;
  scan(s, plan.sinks, plan.sealed, call.lengths);
}

}  // namespace saap
