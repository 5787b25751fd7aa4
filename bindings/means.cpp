// Mean key and mean value of every run of a segment.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "kernels.h"
#include "ops.h"
#include "pool.h"
#include "scratch.h"

namespace saap {

void means(DType type, const MeansSide& keys, const MeansSide& values, int h, int64_t N, int l, const int32_t* table, int64_t table_stride) {
  const int64_t size = static_cast<int64_t>(size_of(type));
  std::atomic<bool> fine{true};
  pool().run(static_cast<int64_t>(h) * l, [&](int64_t item) {
    thread_local Scratch memory;
    const int64_t head = item / l, list = item % l;
    const int64_t first = table[head * table_stride + list], past = table[head * table_stride + list + 1];
    if (first < 0 || past < first || past > N) return fine.store(false, std::memory_order_relaxed);
    for (const MeansSide* side : {&keys, &values}) {
      const int dim = side->dim;
      float *sum = memory.get<float>(2 * static_cast<size_t>(dim)), *row = sum + dim;
      std::fill(sum, sum + dim, 0.f);
      const char* rows = static_cast<const char*>(side->rows) + head * N * dim * size;
      for (int64_t r = first; r < past; r++) {
        kernels().load_row(type, rows + r * dim * size, dim, nullptr, nullptr, 0, false, 1.f, row);
        for (int x = 0; x < dim; x++) sum[x] += row[x];
      }
      const float count = static_cast<float>(std::max<int64_t>(past - first, 1));
      with_type(type, [&](auto t) {
        using T = decltype(t);
        T* out = static_cast<T*>(side->out) + head * side->out_stride + list * dim;
        for (int x = 0; x < dim; x++) out[x] = from_float<T>(sum[x] / count);
      });
    }
  });
  if (!fine) throw std::out_of_range("means: table: the offsets are not ascending row numbers");
}

}  // namespace saap
