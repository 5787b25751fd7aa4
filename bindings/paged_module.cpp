// The operations of paged.h in the Python module, over raw addresses, as in cpu.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "module.h"
#include "paged.h"

namespace nb = nanobind;

namespace saap {
namespace {

using Address = uintptr_t;
template <class T> T* at(Address a) { return reinterpret_cast<T*>(a); }
using Free = nb::gil_scoped_release;

// Everything about a pool but where it lies: what is the same for all layers of an engine, and from step to step.
struct PageShape {
  int type, h, d, e, page;
  int64_t blocks, block_step, head_step, token_step, lists_block, lists_head;
  Pages at_(Address k, Address v, Address lists) const {
    return {at<const void>(k), at<const void>(v), static_cast<DType>(type), h, d, e, page, blocks, block_step, head_step, token_step,
            at<uint8_t>(lists), lists_block, lists_head};
  }
};

}  // namespace

void define_paged(nb::module_& m) {
  nb::class_<PageShape>(m, "PageShape")
      .def(nb::init<int, int, int, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(), nb::arg("type"), nb::arg("h"), nb::arg("d"),
           nb::arg("e"), nb::arg("page"), nb::arg("blocks"), nb::arg("block_step"), nb::arg("head_step"), nb::arg("token_step"),
           nb::arg("lists_block"), nb::arg("lists_head"))
      .def_prop_ro("row", [](const PageShape& s) { return PageRows(s.at_(0, 0, 0)).row; }, "Elements that a row number counts.");
  nb::class_<Paged>(m, "Paged").def("__init__", [](Paged* p, int b, int S, Address blocks, int64_t most, const Ints& lengths, Address bounds,
                                                    const Ints& num_segments) {
    new (p) Paged{b, S, at<const int32_t>(blocks), most, lengths, at<const int32_t>(bounds), num_segments};
  });

  m.def("write_pages", [](const PageShape& shape, Address k, Address v, Address lists, Address keys, int64_t kn, int64_t kh, Address values,
                          int64_t vn, int64_t vh, Address slots, int64_t n, const Quantizer* quantizer, Address cos, Address sin, int r,
                          bool interleaved, float scale) {
    Free free;
    write_pages(shape.at_(k, v, lists), {at<const void>(keys), 0, kh, kn}, {at<const void>(values), 0, vh, vn}, at<const int64_t>(slots), n, quantizer,
                {at<const float>(cos), at<const float>(sin), r, interleaved, scale});
  }, nb::arg("shape"), nb::arg("k"), nb::arg("v"), nb::arg("lists"), nb::arg("keys"), nb::arg("kn"), nb::arg("kh"), nb::arg("values"), nb::arg("vn"),
     nb::arg("vh"), nb::arg("slots"), nb::arg("n"), nb::arg("quantizer").none(), nb::arg("cos"), nb::arg("sin"), nb::arg("r"), nb::arg("interleaved"),
     nb::arg("scale"));
  m.def("count_pages", [](const PageShape& shape, Address lists, const Paged& p, int l, Address tables) {
    Free free;
    count_pages(shape.at_(0, 0, lists), p, l, at<int32_t>(tables));
  });
  m.def("find_pages", [](const PageShape& shape, Address lists, const Paged& p, int l, Address tables, Address numbers, Address counts, int64_t t,
                         int64_t most_rows, Address rows, Address row_counts, Address biases, Address row_biases) {
    Free free;
    find_pages(shape.at_(0, 0, lists), p,
               {l, at<const int32_t>(tables), at<const int32_t>(numbers), at<const int32_t>(counts), t, most_rows, at<int32_t>(rows), at<int32_t>(row_counts),
                at<const float>(biases), at<float>(row_biases)});
  });
  m.def("scan_pages", [](const PageShape& shape, Address k, Address v, int b, Address rows, Address counts, int64_t t, Address q, int q_type, int g,
                         int n_queries, float scale, bool causal, Address out, Address lse, Address biases) {
    Free free;
    scan_pages(shape.at_(k, v, 0), b, at<const int32_t>(rows), at<const int32_t>(counts), t,
               {at<const void>(q), static_cast<DType>(q_type), g, n_queries, scale, causal, at<void>(out), at<float>(lse), at<const float>(biases)});
  });
  m.def("search_pages", [](const PageShape& shape, Address k, Address v, Address lists, const Paged& p, const Router* router, int first_knot,
                           bool size_weighted, Address cos, Address sin, int r, bool interleaved, float turn, int nprobe, Address budgets, Address unread_mass,
                           Address sampled, Address exponents, Address caps, Address q, int q_type, int g, int n_queries, float scale, Address out, Address lse) {
    PagedSearch search{router, first_knot, size_weighted, {at<const float>(cos), at<const float>(sin), r, interleaved, turn}, nprobe,
                       at<const int32_t>(budgets), at<const float>(unread_mass), at<const int32_t>(sampled), at<const int32_t>(exponents),
                       at<const float>(caps)};
    Free free;
    return search_pages(shape.at_(k, v, lists), p, search,
                        {at<const void>(q), static_cast<DType>(q_type), g, n_queries, scale, true, at<void>(out), at<float>(lse)});
  }, nb::arg("shape"), nb::arg("k"), nb::arg("v"), nb::arg("lists"), nb::arg("paged"), nb::arg("router").none(), nb::arg("first_knot"),
     nb::arg("size_weighted"), nb::arg("cos"), nb::arg("sin"), nb::arg("r"), nb::arg("interleaved"), nb::arg("turn"), nb::arg("nprobe"),
     nb::arg("budgets"), nb::arg("unread_mass"), nb::arg("sampled"), nb::arg("exponents"), nb::arg("caps"), nb::arg("q"), nb::arg("q_type"), nb::arg("g"), nb::arg("n_queries"), nb::arg("scale"), nb::arg("out"),
     nb::arg("lse"));
}

}  // namespace saap
