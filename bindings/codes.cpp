// Codes of rows that are about to be sealed.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "pool.h"

namespace saap {

void encode(int bits, DType type, Strided rows, int h, int64_t n, int dim, uint8_t* out, int64_t out_stride) {
  constexpr int64_t kRows = 256;
  const Kernels& kern = kernels();
  const int64_t blocks = (n + kRows - 1) / kRows, size = static_cast<int64_t>(size_of(type)), code = code_size(dim, bits);
  pool().run(blocks * h, [&](int64_t item) {
    alignas(64) float floats[kEncodeRows][256 + 16] = {};
    const int64_t head = item / blocks, from = item % blocks * kRows, stop = std::min(n, from + kRows);
    for (int64_t i = from; i < stop; i += kEncodeRows) {
      const int count = static_cast<int>(std::min<int64_t>(kEncodeRows, stop - i));
      for (int r = 0; r < count; r++)
        kern.load_row(type, static_cast<const char*>(rows.data) + (head * rows.h + (i + r) * rows.n) * size, dim, nullptr, nullptr, 0, false, 1,
                      floats[r]);
      kern.encode(bits, floats[0], 256 + 16, count, dim, out + head * out_stride + i * code);
    }
  });
}

}  // namespace saap
