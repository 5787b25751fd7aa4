// The matrix instructions: the last lane to come works for all 32.
#include <algorithm>

#include "machine.h"
#include "half.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace emu {

static constexpr Kind kLdmatrix{"ldmatrix", true, false}, kMovmatrix{"movmatrix", true, false}, kMma{"mma", true, false};

// A phase of ldmatrix reads eight rows of 16 bytes; each set of four banks serves one of them at a time.
static void count_conflicts(void* const* rows, const char* base, Site at) {
  unsigned extra = 0;
  for (int phase = 0; phase < 4; phase++) {
    unsigned most = 1;
    for (int i = 0; i < 8; i++) {
      unsigned same = 1;
      auto unit = [&](int k) { return (static_cast<const char*>(rows[8 * phase + k]) - base) / 16; };
      for (int k = 0; k < i; k++) same += unit(k) % 8 == unit(i) % 8 && unit(k) != unit(i);
      most = std::max(most, same);
    }
    extra += most - 1;
  }
  auto& all = machine.conflicts;
  auto mine = std::find_if(all.begin(), all.end(), [&](const Conflict& c) {
    return c.at.line() == at.line() && c.at.file_name() == at.file_name();
  });
  if (mine == all.end()) mine = all.insert(all.end(), {at, 0, 0});
  mine->phases += 4, mine->extra += extra;
}

struct Ldmatrix {
  u16 row[8];
  u32 result[4];
  const void* address;
  bool transposed;
  Site at;
};

void ldmatrix(u32 (&r)[4], const void* row, bool transposed, Site at) {
  check_shared(row, 16, "ldmatrix", at);
  declare_read(row, 16);
  Ldmatrix mine{{}, {}, row, transposed, at};
  __builtin_memcpy(mine.row, row, 16);
  gather(kLdmatrix, ~0u, &mine, [](void* const* arguments, unsigned) {
    void* rows[32];
    for (int i = 0; i < 32; i++) rows[i] = const_cast<void*>(static_cast<Ldmatrix*>(arguments[i])->address);
    auto* any = static_cast<Ldmatrix*>(arguments[0]);
    machine.counters.matrices += 4;
    count_conflicts(rows, machine.current->block->memory, any->at);
    for (int lane = 0; lane < 32; lane++) {
      int g = lane / 4, c = lane % 4 * 2;
      auto* to = static_cast<Ldmatrix*>(arguments[lane]);
      for (int m = 0; m < 4; m++) {
        auto element = [&](int i, int k) -> u32 { return static_cast<Ldmatrix*>(arguments[8 * m + i])->row[k]; };
        to->result[m] = to->transposed ? element(c, g) | element(c + 1, g) << 16 : element(g, c) | element(g, c + 1) << 16;
      }
    }
  }, at);
  Quiet quiet;
  for (int m = 0; m < 4; m++) r[m] = mine.result[m];
}

struct Mma {
  float c[4];
  u32 a[4], b[2];
};

template <int T, int n>
static void widen_all(const u16 (&from)[n], float (&to)[n]) {
  if constexpr (T == kBF16) {
    for (int i = 0; i < n; i++) to[i] = widen_bfloat(from[i]);
  } else {
#if defined(__F16C__)
    for (int i = 0; i < n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#else
    for (int i = 0; i < n; i++) to[i] = widen_half(from[i]);
#endif
  }
}

template <int T>
static void multiply(void* const* arguments, unsigned) {
  u16 bits_a[16 * 16], bits_b[16 * 8];
  float a[16 * 16], b[16 * 8], c[16 * 8];
  for (int lane = 0; lane < 32; lane++) {
    auto* x = static_cast<const Mma*>(arguments[lane]);
    int g = lane / 4, t = lane % 4 * 2;
    for (int half = 0; half < 2; half++) {
      auto part = [half](u32 v) { return static_cast<u16>(v >> 16 * half); };
      for (int i = 0; i < 4; i++) bits_a[(g + i % 2 * 8) * 16 + t + i / 2 * 8 + half] = part(x->a[i]);
      for (int i = 0; i < 2; i++) bits_b[(t + i * 8 + half) * 8 + g] = part(x->b[i]);
      for (int i = 0; i < 2; i++) c[(g + i * 8) * 8 + t + half] = x->c[2 * i + half];
    }
  }
  widen_all<T>(bits_a, a);
  widen_all<T>(bits_b, b);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) c[i * 8 + j] += a[i * 16 + k] * b[k * 8 + j];
  for (int lane = 0; lane < 32; lane++) {
    auto* x = static_cast<Mma*>(arguments[lane]);
    int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; i++) x->c[i] = c[(g + i / 2 * 8) * 8 + t + i % 2];
  }
}


u32 movmatrix(u32 a, Site at) {
  struct Argument {
    u32 a, result;
  } mine{a, 0};
  gather(kMovmatrix, ~0u, &mine, [](void* const* arguments, unsigned) {
    u32 m[8][8];
    for (int lane = 0; lane < 32; lane++) {
      u32 x = static_cast<Argument*>(arguments[lane])->a;
      m[lane / 4][lane % 4 * 2] = x & 0xffff, m[lane / 4][lane % 4 * 2 + 1] = x >> 16;
    }
    for (int lane = 0; lane < 32; lane++)
      static_cast<Argument*>(arguments[lane])->result = m[lane % 4 * 2][lane / 4] | m[lane % 4 * 2 + 1][lane / 4] << 16;
  }, at);
  Quiet quiet;
  return mine.result;
}

template <int T>
void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Site at) {
  Mma mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  gather(kMma, ~0u, &mine, multiply<T>, at);
  Quiet quiet;
  for (int i = 0; i < 4; i++) c[i] = mine.c[i];
}

template void mma<kBF16>(float (&)[4], const u32 (&)[4], u32, u32, Site);
template void mma<kF16>(float (&)[4], const u32 (&)[4], u32, u32, Site);

}  // namespace emu
