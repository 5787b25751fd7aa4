// The operations made of panel products: assigning keys to lists, and the query router.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "kernels.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"

namespace saap {
namespace {

template <class T>
std::shared_ptr<T[]> aligned(int64_t n) {
  // Over-allocated rather than aligned_alloc, which not every platform has.
  T* raw = new T[n + 64]();
  T* at = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(raw) + 63) & ~uintptr_t(63));
  return std::shared_ptr<T[]>(at, [raw](T*) { delete[] raw; });
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// One or two bytes a weight if that loses nothing.
void make_narrow(Panels& p, int heads) {
  const int64_t n = heads * p.head_size;
  bool whole = true, narrow = true;
  for (int64_t i = 0; i < n; i++) {
    const float x = p.weights[i];
    whole = whole && std::fabs(x) <= 127 && x == std::nearbyint(x);
    narrow = narrow && !(bits_of(x) & 0xffffu);
  }
  if (!whole && !narrow) return;
  if (whole) {
    p.bytes = aligned<int8_t>(n);
    for (int64_t i = 0; i < n; i++) p.bytes[i] = static_cast<int8_t>(p.weights[i]);
    p.weights.reset();
    return;
  }
  p.narrow = aligned<uint32_t>(n / 2);
  constexpr int kHalf = kPanel / 2;
  for (int64_t row = 0; row < n / kPanel; row++)
    for (int c = 0; c < kHalf; c++)
      p.narrow[row * kHalf + c] = bits_of(p.weights[row * kPanel + c]) >> 16 | bits_of(p.weights[row * kPanel + c + kHalf]);
  p.weights.reset();
}

// cols columns of k weights each, weight(head, column, i) and bias(head, column), per head. Columns that fill the last panel up
// get `filler` as their bias.
template <class Weight, class Bias>
Panels make_panels(int heads, int cols, int k, float filler, Weight weight, Bias bias) {
  Panels p;
  p.count = (cols + kPanel - 1) / kPanel;
  p.k = k;
  p.cols = cols;
  p.head_size = static_cast<int64_t>(p.count) * k * kPanel;
  p.weights = aligned<float>(heads * p.head_size);
  p.bias = aligned<float>(static_cast<int64_t>(heads) * p.count * kPanel);
  for (int h = 0; h < heads; h++)
    for (int c = 0; c < p.count * kPanel; c++) {
      p.bias[(static_cast<int64_t>(h) * p.count) * kPanel + c] = c < cols ? bias(h, c) : filler;
      float* panel = p.weights.get() + h * p.head_size + static_cast<int64_t>(c / kPanel) * k * kPanel + c % kPanel;
      for (int i = 0; i < k && c < cols; i++) panel[static_cast<int64_t>(i) * kPanel] = weight(h, c, i);
    }
  return p;
}

PanelProduct product(const Panels& p, int head, int first, int last, const float* x, int n, int64_t ldx) {
  PanelProduct out{};
  out.x = x, out.n = n, out.k = p.k, out.ldx = ldx;
  const int64_t at = head * p.head_size + static_cast<int64_t>(first) * p.k * kPanel;
  out.panels = p.weights ? p.weights.get() + at : nullptr;
  out.narrow = p.narrow ? p.narrow.get() + at / 2 : nullptr;
  out.bytes = p.bytes ? p.bytes.get() + at : nullptr;
  out.bias = p.bias.get() + (static_cast<int64_t>(head) * p.count + first) * kPanel;
  out.num_panels = last - first;
  return out;
}

}  // namespace

std::shared_ptr<Quantizer> make_quantizer(const float* centroids, const float* bias, int h, int l, int d) {
  auto at = [=](int head, int list) { return centroids + (static_cast<int64_t>(head) * l + list) * d; };
  auto raised_by = [=](int head, int list) {
    if (bias) return bias[static_cast<int64_t>(head) * l + list];
    double sum = 0;
    for (int i = 0; i < d; i++) sum += static_cast<double>(at(head, list)[i]) * at(head, list)[i];
    return static_cast<float>(-0.5 * sum);
  };
  auto weight = [=](int head, int list, int i) { return at(head, list)[i]; };
  auto out = std::make_shared<Quantizer>();
  out->heads = h, out->lists = l, out->dim = d;
  out->panels = make_panels(h, l, d, -std::numeric_limits<float>::infinity(), weight, raised_by);
  return out;
}

void assign(const Quantizer& quantizer, DType type, Strided keys, int64_t n, const Angles& angles, int32_t* list_nos) {
  constexpr int64_t kKeys = 96;  // of an item: their floats and the best columns so far stay in the first caches
  const Kernels& kern = kernels();
  const int d = quantizer.dim, half = angles.r / 2;
  const int64_t blocks = (n + kKeys - 1) / kKeys, items = blocks * quantizer.heads;
  auto one = [&](int64_t item) {
    thread_local Scratch memory;
    float* x = memory.get<float>(kKeys * d);
    const int head = static_cast<int>(item / blocks);
    const int64_t from = item % blocks * kKeys;
    const int count = static_cast<int>(std::min(kKeys, n - from));
    const char* src = static_cast<const char*>(keys.data) + (head * keys.h + from * keys.n) * static_cast<int64_t>(size_of(type));
    for (int i = 0; i < count; i++) {
      const int64_t at = (from + i) * half;
      kern.load_row(type, src + i * keys.n * static_cast<int64_t>(size_of(type)), d, angles.cos + at, angles.sin + at, angles.r,
                    angles.interleaved, angles.scale, x + static_cast<int64_t>(i) * d);
    }
    kern.nearest(product(quantizer.panels, head, 0, quantizer.panels.count, x, count, d), list_nos + head * n + from);
  };
  // A few rows of a token that looks ahead take a quarter of a millisecond: on a loaded machine a worker that has one of their heads,
  // and no core, would make the token wait for many times that.
  if (n * quantizer.heads * quantizer.lists * d < (16 << 20))
    for (int64_t item = 0; item < items; item++) one(item);
  else pool().run(items, one);
}

std::shared_ptr<Router> make_router(const RouterArrays& w, int h, int u, int d, int l, int m, int k) {
  const int64_t o = k + m;
  auto router = std::make_shared<Router>();
  router->heads = h, router->hidden_units = u, router->dim = d, router->lists = l, router->knots = m, router->leading = k;
  auto none = [](int, int) { return 0.f; };
  router->hidden = make_panels(
      h, u, d, 0.f, [=](int head, int c, int i) { return w.hidden[(static_cast<int64_t>(head) * u + c) * d + i]; },
      [=](int head, int c) { return w.bias_hidden[static_cast<int64_t>(head) * u + c]; });
  // Both inputs of the second layer side by side: hidden units, then the query itself.
  auto second = [=](int first, int cols) {
    return make_panels(
        h, cols, u + d, 0.f,
        [=](int head, int c, int i) {
          const int64_t row = head * o + first + c;
          return i < u ? w.out[row * u + i] : w.skip[row * d + i - u];
        },
        [=](int head, int c) { return w.bias_out[head * o + first + c]; });
  };
  router->to_leading = second(0, k);
  router->to_knots = second(k, m);
  if (w.lists) {
    router->to_lists = make_panels(
        h, l, k, 0.f, [=](int head, int c, int i) { return w.lists[(static_cast<int64_t>(head) * l + c) * k + i]; }, none);
    router->scales = aligned<float>(static_cast<int64_t>(h) * k);
    std::copy_n(w.scales, static_cast<int64_t>(h) * k, router->scales.get());
  }
  for (Panels* p : {&router->hidden, &router->to_leading, &router->to_knots, &router->to_lists}) make_narrow(*p, h);
  return router;
}

namespace {
constexpr int64_t kColumns = 48;  // queries of an item: weights are read once for all of them
int64_t column_groups(int g, int q) { return (static_cast<int64_t>(g) * q + kColumns - 1) / kColumns; }
}  // namespace

int64_t route_items(const Router& router, int b, int g, int q) {
  const Panels& last_panels = router.scales ? router.to_lists : router.to_leading;
  const int64_t groups = column_groups(g, q), whole = static_cast<int64_t>(b) * router.heads * groups;
  // With few heads the lists are shared out too, at the price of computing what comes before them once for each part: little if
  // those are hidden units alone.
  const int64_t items = (router.scales ? 1 : 2) * static_cast<int64_t>(pool().threads());
  const int64_t wanted = (items + whole - 1) / std::max<int64_t>(whole, 1);
  return groups * std::clamp<int64_t>(wanted, 1, std::max(1, last_panels.count / 4));
}

void route_item(const Router& router, DType type, const void* queries, int g, int q, const Angles& angles, float* z, float* a,
                int64_t items, int64_t item) {
  const Kernels& kern = kernels();
  const int u = router.hidden_units, d = router.dim, k = u + d, half = angles.r / 2, leading = router.leading;
  const Panels& last_panels = router.scales ? router.to_lists : router.to_leading;
  const int64_t j = static_cast<int64_t>(g) * q, groups = column_groups(g, q);
  const int parts = static_cast<int>(items / groups);
  thread_local Scratch memory;
  float* x = memory.get<float>(kColumns * (k + leading));
  float* sought = x + kColumns * k;
  const int part = static_cast<int>(item % parts);
  const int64_t group = item / parts % groups, bh = item / parts / groups;
  const int head = static_cast<int>(bh % router.heads);
  const int64_t sequence = bh / router.heads, from = group * kColumns;
  const int n = static_cast<int>(std::min(kColumns, j - from));
  const char* src = static_cast<const char*>(queries) + (bh * j + from) * d * static_cast<int64_t>(size_of(type));
  for (int i = 0; i < n; i++) {
    const int64_t at = (sequence * q + (from + i) % q) * half;
    kern.load_row(type, src + static_cast<int64_t>(i) * d * static_cast<int64_t>(size_of(type)), d, angles.cos + at, angles.sin + at,
                  angles.r, angles.interleaved, angles.scale, x + static_cast<int64_t>(i) * k + u);
  }
  if (u) kern.dense(product(router.hidden, head, 0, router.hidden.count, x + u, n, k), true, x, k, u);
  const float* input = x;
  int64_t width = k;
  if (router.scales) {
    kern.dense(product(router.to_leading, head, 0, router.to_leading.count, x, n, k), false, sought, leading, leading);
    for (int i = 0; i < n; i++)
      for (int c = 0; c < leading; c++) sought[i * leading + c] *= router.scales[static_cast<int64_t>(head) * leading + c];
    input = sought, width = leading;
  }
  const int count = last_panels.count;
  const int first = static_cast<int>(static_cast<int64_t>(count) * part / parts), last = static_cast<int>(static_cast<int64_t>(count) * (part + 1) / parts);
  const int64_t row = bh * j + from;
  kern.dense(product(last_panels, head, first, last, input, n, width), false, z + row * router.lists + static_cast<int64_t>(first) * kPanel,
             router.lists, router.lists - first * kPanel);
  if (part == parts - 1 && router.knots)
    kern.dense(product(router.to_knots, head, 0, router.to_knots.count, x, n, k), false, a + row * router.knots, router.knots, router.knots);
}

void route(const Router& router, DType type, const void* queries, int b, int g, int q, const Angles& angles, float* z, float* a) {
  const int64_t items = route_items(router, b, g, q);
  pool().run(items * b * router.heads, [&](int64_t item) { route_item(router, type, queries, g, q, angles, z, a, items, item); },
             Pool::Next::kSoon);
}

}  // namespace saap
