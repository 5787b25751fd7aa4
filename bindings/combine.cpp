// Merging two attention states element by element, and the reader that measures what memory gives.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cuda/softmax_state.cuh"
#include "ops.h"
#include "pool.h"

namespace saap {

void combine(DType type, const void* out_a, const float* lse_a, const void* out_b, const float* lse_b, int64_t n, int e, void* out, float* lse) {
  const int64_t rows_per_item = std::max<int64_t>(1, 16384 / std::max(e, 1));
  with_type(type, [&](auto t) {
    using T = decltype(t);
    pool().run((n + rows_per_item - 1) / rows_per_item, [&](int64_t item) {
      for (int64_t i = item * rows_per_item; i < std::min(n, (item + 1) * rows_per_item); i++) {
        softmax_mass mass = softmax_mass::from_lse(lse_a[i]);
        float keep, take;
        mass.join(softmax_mass::from_lse(lse_b[i]), keep, take);
        const float inverse = mass.inverse();
        keep *= inverse, take *= inverse;
        const T *a = static_cast<const T*>(out_a) + i * e, *b = static_cast<const T*>(out_b) + i * e;
        T* o = static_cast<T*>(out) + i * e;
        // A side of weight zero is left out, not multiplied: it may hold anything.
        for (int x = 0; x < e; x++) {
          const float left = keep != 0 ? to_float(a[x]) * keep : 0.f, right = take != 0 ? to_float(b[x]) * take : 0.f;
          o[x] = from_float<T>(left + right);
        }
        lse[i] = mass.lse();
      }
    });
  });
}

uint64_t read_memory(const void* memory, int64_t bytes) {
  constexpr int64_t kChunk = 1 << 17;
  std::atomic<uint64_t> total{0};
  pool().run(bytes / kChunk, [&](int64_t c) {
    const uint64_t* p = static_cast<const uint64_t*>(memory) + c * (kChunk / 8);
    uint64_t sum[16] = {};
    for (int64_t i = 0; i < kChunk / 8; i += 16) {
      __builtin_prefetch(p + i + 512);
      __builtin_prefetch(p + i + 520);
      for (int k = 0; k < 16; k++) sum[k] += p[i + k];
    }
    for (int k = 1; k < 16; k++) sum[0] += sum[k];
    total.fetch_add(sum[0], std::memory_order_relaxed);
  });
  return total.load();
}

std::vector<double> read_bandwidth(int64_t bytes, int repetitions) {
  constexpr int64_t kHuge = 2 << 20;
  bytes = bytes / kHuge * kHuge;
  void* raw = std::malloc(bytes + kHuge);
  if (!raw) throw std::bad_alloc();
  uint64_t* memory = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(raw) + kHuge - 1) & ~uintptr_t(kHuge - 1));
#if defined(__linux__)
  madvise(memory, bytes, MADV_HUGEPAGE);  // as NumPy asks for the arena
#endif
  for (int64_t i = 0; i < bytes / 8; i += 8) memory[i] = i;
  std::vector<double> figures;
  volatile uint64_t used = 0;
  for (int r = 0; r < repetitions; r++) {
    const auto begin = std::chrono::steady_clock::now();
    used = read_memory(memory, bytes);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    figures.push_back(bytes / took.count() * 1e-9);
  }
  (void)used;
  std::free(raw);
  return figures;
}

}  // namespace saap
