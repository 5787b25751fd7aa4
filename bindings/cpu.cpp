// The Python module saap_index._cpu: the operations of ops.h over raw addresses. backends/cpu.py, its only caller, has checked
// dtypes, shapes and strides; addresses instead of array objects keep a call below a microsecond.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "kernels.h"
#include "module.h"
#include "ops.h"
#include "pool.h"

namespace nb = nanobind;
using namespace saap;

namespace {

using Address = uintptr_t;
template <class T> T* at(Address a) { return reinterpret_cast<T*>(a); }

using Free = nb::gil_scoped_release;  // while kernels run, other Python threads do

Angles angles(Address cos, Address sin, int r, bool interleaved, float scale) {
  return {at<const float>(cos), at<const float>(sin), r, interleaved, scale};
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Native CPU kernels of saap_index; use saap_index.backends.cpu.";

  nb::class_<Quantizer>(m, "Quantizer")
      .def_prop_ro("shape", [](const Quantizer& q) { return nb::make_tuple(q.heads, q.lists, q.dim); });
  nb::class_<Router>(m, "Router").def_prop_ro("shape", [](const Router& r) {
    return nb::make_tuple(r.heads, r.hidden_units, r.dim, r.lists, r.knots);
  });

  m.def("append", [](int type, Address keys, int64_t kb, int64_t kh, int64_t kn, Address values, int64_t vb, int64_t vh, int64_t vn,
                     Address arena_keys, Address arena_values, int b, int h, int64_t N, int d, int e, const Ints& starts, const Ints& counts) {
    AppendSide k{{at<const void>(keys), kb, kh, kn}, at<void>(arena_keys), d};
    AppendSide v{{at<const void>(values), vb, vh, vn}, at<void>(arena_values), e};
    Free free;
    return append(static_cast<DType>(type), k, v, b, h, N, starts, counts);
  });

  m.def("make_quantizer", [](Address centroids, Address bias, int h, int l, int d) {
    return make_quantizer(at<const float>(centroids), at<const float>(bias), h, l, d);
  });
  m.def("assign", [](const Quantizer& q, int type, Address keys, int64_t kh, int64_t kn, int64_t n, Address cos, Address sin, int r,
                     bool interleaved, float scale, Address list_nos) {
    Free free;
    assign(q, static_cast<DType>(type), {at<const void>(keys), 0, kh, kn}, n, angles(cos, sin, r, interleaved, scale), at<int32_t>(list_nos));
  });

  m.def("seal", [](int type, Address keys, Address values, Address ids, int h, int64_t N, int d, int e, int64_t start, int64_t n,
                   Address list_nos, int l, Address table, int64_t table_stride) {
    Free free;
    seal(static_cast<DType>(type), at<void>(keys), at<void>(values), at<int32_t>(ids), h, N, d, e, start, n, at<const int32_t>(list_nos), l,
         at<int32_t>(table), table_stride);
  });

  m.def("merge", [](int type, Address keys, Address values, Address ids, int h, int64_t N, int d, int e, const Ints& bounds, int l,
                    Address tables, int64_t tables_stride, Address joined, int64_t joined_stride) {
    Free free;
    merge(static_cast<DType>(type), at<void>(keys), at<void>(values), at<int32_t>(ids), h, N, d, e, bounds, l, at<int32_t>(tables),
          tables_stride, at<int32_t>(joined), joined_stride);
  });

  m.def("encode", [](int bits, int type, Address rows, int64_t rows_h, int64_t rows_n, int h, int64_t n, int dim, Address out,
                     int64_t out_stride) {
    Free free;
    encode(bits, static_cast<DType>(type), {at<const void>(rows), 0, rows_h, rows_n}, h, n, dim, at<uint8_t>(out), out_stride);
  });

  m.def("make_router", [](Address hidden, Address bias_hidden, Address out, Address skip, Address bias_out, Address lists, Address scales,
                          int h, int u, int d, int l, int m, int k) {
    return make_router({at<const float>(hidden), at<const float>(bias_hidden), at<const float>(out), at<const float>(skip),
                        at<const float>(bias_out), at<const float>(lists), at<const float>(scales)}, h, u, d, l, m, k);
  });
  m.def("route", [](const Router& router, int type, Address queries, int b, int g, int q, Address cos, Address sin, int r, bool interleaved,
                    float scale, Address z, Address a) {
    Free free;
    route(router, static_cast<DType>(type), at<const void>(queries), b, g, q, angles(cos, sin, r, interleaved, scale), at<float>(z), at<float>(a));
  });

  m.def("means", [](int type, Address keys, Address values, int h, int64_t N, int d, int e, int l, Address table, int64_t table_stride,
                    Address mean_keys, int64_t keys_stride, Address mean_values, int64_t values_stride) {
    MeansSide k{at<const void>(keys), at<void>(mean_keys), keys_stride, d}, v{at<const void>(values), at<void>(mean_values), values_stride, e};
    Free free;
    means(static_cast<DType>(type), k, v, h, N, l, at<const int32_t>(table), table_stride);
  });

  m.def("probe_bound", [](Address tables, int b, int h, int l, int S, const Ints& num_segments, Address budgets) {
    ProbeArgs p{};
    p.tables = at<const int32_t>(tables), p.b = b, p.h = h, p.l = l, p.S = S, p.budgets = at<const int32_t>(budgets);
    return probe_bound(p, num_segments);
  });
  m.def("probe", [](Address z, Address a, Address knots, Address tables, int b, int h, int j, int l, int k, int S, bool size_weighted, int nprobe,
                    const Ints& num_segments, Address budgets, Address unread_mass, Address entries, const Ints& means, int64_t bound, Address rows,
                    Address counts, int64_t tail_bound, Address tail, Address tail_counts, Address sampled, Address exponents, Address caps,
                    Address biases) {
    ProbeArgs p{at<const float>(z), at<const float>(a), at<const float>(knots), at<const int32_t>(tables), b, h, j, l, k, S, size_weighted, nprobe,
                at<const int32_t>(budgets), at<const float>(unread_mass), at<const int32_t>(entries), at<const int32_t>(sampled),
                at<const int32_t>(exponents), at<const float>(caps)};
    ProbeOut r{bound, at<int32_t>(rows), at<int32_t>(counts), at<float>(biases)}, t{tail_bound, at<int32_t>(tail), at<int32_t>(tail_counts)};
    {
      Free free;
      probe(p, num_segments, means, r, t);
    }
    return nb::make_tuple(r.width, t.width);
  });

  m.def("scan", [](Address q, int q_type, Address k, Address v, int type, int b, int h, int g, int n_queries, int d, int e, int64_t N,
                   Address rows, Address counts, int64_t t, const Ints& sinks, const Ints& sealed, const Ints& lengths, float scale,
                   bool causal, Address out, Address lse, Address runs, Address run_counts, int64_t x, Address mean_k, Address mean_v, int64_t M,
                   Address tables, int64_t S, int l, Address code_k, Address code_v, int64_t code_N, int value_bits, const Ints& first,
                   const Ints& last, Address biases) {
    CodedRows coded{at<const uint8_t>(code_k), at<const uint8_t>(code_v), code_N, value_bits, first, last};
    TailArgs tail{at<const int32_t>(runs), at<const int32_t>(run_counts), x, at<const void>(mean_k), at<const void>(mean_v), M,
                  at<const int32_t>(tables), S, l};
    ScanArgs p{at<const void>(q), at<const void>(k), at<const void>(v), static_cast<DType>(q_type), static_cast<DType>(type), b, h, g,
               n_queries, d, e, N, at<const int32_t>(rows), at<const int32_t>(counts), t, scale, causal, at<void>(out), at<float>(lse), tail, std::move(coded),
               at<const float>(biases)};
    Free free;
    scan(p, sinks, sealed, lengths);
  });

  m.def("best", [](Address q, int q_type, Address k, int type, int b, int h, int g, int n_queries, int d, int64_t N, Address rows,
                   Address counts, int64_t t, const Ints& sinks, const Ints& sealed, const Ints& lengths, int64_t number, Address scores,
                   Address found) {
    BestArgs p{at<const void>(q), at<const void>(k), static_cast<DType>(q_type), static_cast<DType>(type), b, h, g, n_queries, d, N,
               at<const int32_t>(rows), at<const int32_t>(counts), t, number, at<float>(scores), at<int64_t>(found)};
    Free free;
    best(p, sinks, sealed, lengths);
  });

  nb::class_<SearchPlan>(m, "SearchPlan");
  m.def("make_search", [](std::shared_ptr<Router> router, int first_knot, bool size_weighted, Address centres, int b, int h, int S, int nprobe,
                          Address tables, const Ints& num_segments, Address budgets, Address unread_mass, Address entries, const Ints& means,
                          Address k, Address v, int type, int64_t N, int e, const Ints& sinks, const Ints& sealed, float scale, Address mean_k,
                          Address mean_v, int64_t M, Address code_k, Address code_v, int64_t code_N, int value_bits, const Ints& first,
                          const Ints& last, Address sampled, Address exponents, Address caps) {
    const double* from = at<const double>(centres);
    auto plan = std::make_unique<SearchPlan>();
    plan->router = router, plan->first_knot = first_knot;
    plan->centres.assign(from, from + static_cast<int64_t>(b) * S);
    plan->num_segments = num_segments, plan->means = means, plan->sinks = sinks, plan->sealed = sealed;
    plan->probe = {nullptr, nullptr, nullptr, at<const int32_t>(tables), b, h, 0, router->lists, router->knots, S, size_weighted, nprobe,
                   at<const int32_t>(budgets), at<const float>(unread_mass), at<const int32_t>(entries), at<const int32_t>(sampled),
                   at<const int32_t>(exponents), at<const float>(caps)};
    plan->scan.k = at<const void>(k), plan->scan.v = at<const void>(v), plan->scan.type = static_cast<DType>(type);
    plan->scan.b = b, plan->scan.h = h, plan->scan.d = router->dim, plan->scan.e = e, plan->scan.N = N;
    plan->scan.scale = scale, plan->scan.causal = true;
    plan->scan.tail = {nullptr, nullptr, 0, at<const void>(mean_k), at<const void>(mean_v), M, at<const int32_t>(tables), S, router->lists};
    plan->scan.coded = {at<const uint8_t>(code_k), at<const uint8_t>(code_v), code_N, value_bits, first, last};
    return plan;
  });
  m.def("search", [](const SearchPlan& plan, Address q, int q_type, int g, int n_queries, Address cos, Address sin, int r, bool interleaved,
                     float turn, const Ints& ends, const Ints& lengths, Address out, Address lse, int64_t bound, Address rows, Address counts,
                     int64_t tail_bound, Address tail, Address tail_counts, Address biases) {
    SearchCall call{at<const void>(q), static_cast<DType>(q_type), g, n_queries, angles(cos, sin, r, interleaved, turn), ends, lengths,
                    at<void>(out), at<float>(lse)};
    ProbeOut found{bound, at<int32_t>(rows), at<int32_t>(counts), at<float>(biases)}, entries{tail_bound, at<int32_t>(tail), at<int32_t>(tail_counts)};
    {
      Free free;
      search(plan, call, found, entries);
    }
    return nb::make_tuple(found.width, entries.width);
  });

  define_paged(m);

  m.def("combine", [](int type, Address out_a, Address lse_a, Address out_b, Address lse_b, int64_t n, int e, Address out, Address lse) {
    Free free;
    combine(static_cast<DType>(type), at<const void>(out_a), at<const float>(lse_a), at<const void>(out_b), at<const float>(lse_b), n, e,
            at<void>(out), at<float>(lse));
  });

  m.def("read_memory", [](Address memory, int64_t bytes) { return read_memory(at<const void>(memory), bytes); }, nb::arg("address"),
        nb::arg("bytes"), nb::call_guard<Free>(), "The sum of the words of memory, whole times 128 KiB: what a bare read costs.");
  m.def("read_bandwidth", &read_bandwidth, nb::arg("bytes") = int64_t(1) << 30, nb::arg("repetitions") = 5,
        nb::call_guard<Free>(), "GB/s at which all threads together read that much memory, one figure per repetition.");
  m.def("set_num_threads", &set_num_threads, nb::arg("threads"), "Threads of the pool; 0: SAAP_NUM_THREADS, or what was suggested.");
  m.def("suggest_num_threads", &suggest_num_threads, nb::arg("threads"), "Threads of the pool where nobody asked for a number.");
  m.def("get_num_threads", &get_num_threads);
  m.def("isa", [] { return std::string(kernels().name); }, "Instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const char* name : {"baseline", "avx2", "avx512"})
      if (isa_supported(name)) names.push_back(name);
    return names;
  }, "Instruction sets this processor can run, slowest first.");
  m.def("set_isa", [](const std::string& name) {
    if (!select_isa(name.c_str())) throw nb::value_error(("set_isa: this processor has no " + name).c_str());
  }, nb::arg("name"));
}
