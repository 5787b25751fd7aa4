// Compiles the inner loops once per instruction set and chooses among them at run time. All headers come first: a function of
// the standard library compiled under a wider target could be the copy that the linker keeps for everybody.
#include "kernels.h"

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__) || defined(_M_X64)
#define SAAP_X86 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace saap {
#if defined(__aarch64__) || defined(__AVX512F__)
constexpr bool kWideFile = true;  // 32 vector registers
#else
constexpr bool kWideFile = false;
#endif

#define TABLE(title)                                                                                                              \
  const Kernels table = {title,       W,      2 * W,   scan,  scores,   pack_queries, unpack_values, scan_codes,                  \
                         rotate_back, encode, nearest, dense, load_row, run_weights,  list_weights,  heavy_runs, find_lists};

namespace baseline {
#define W 4
#include "simd.inl.h"
#include "scan.inl.h"
#include "codes.inl.h"
#include "panels.inl.h"
#include "probe.inl.h"
#include "paged.inl.h"
TABLE("baseline")
#undef W
}  // namespace baseline

#ifdef SAAP_X86
// The tests compile the 16-lane code for AVX2 too, so that its logic runs where no AVX-512 is at hand.
#ifdef SAAP_EMULATE_AVX512
#define WIDE_TARGET "avx2,fma,f16c"
#else
#define WIDE_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#endif
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define W 8
#include "simd.inl.h"
#include "scan.inl.h"
#include "codes.inl.h"
#include "panels.inl.h"
#include "probe.inl.h"
#include "paged.inl.h"
TABLE("avx2")
#undef W
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target(WIDE_TARGET))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#ifdef SAAP_EMULATE_AVX512
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#endif
namespace avx512 {
#define W 16
#include "simd.inl.h"
#include "scan.inl.h"
#include "codes.inl.h"
#include "panels.inl.h"
#include "probe.inl.h"
#include "paged.inl.h"
TABLE("avx512")
#undef W
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

const Kernels* find(const char* name) {
#ifdef SAAP_X86
  // These ask the operating system's saved state (xgetbv) as well as cpuid.
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef SAAP_EMULATE_AVX512
  const bool has_avx512 = has_avx2;
#else
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  if (has_avx512 && !std::strcmp(name, "avx512")) return &avx512::table;
  if (has_avx2 && !std::strcmp(name, "avx2")) return &avx2::table;
#endif
  return std::strcmp(name, "baseline") ? nullptr : &baseline::table;
}

const Kernels* best() {
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* k = find(name)) return k;
  return &baseline::table;
}

std::atomic<const Kernels*> chosen{best()};

}  // namespace

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

bool isa_supported(const char* name) { return find(name) != nullptr; }

bool select_isa(const char* name) {
  const Kernels* k = find(name);
  if (k) chosen.store(k, std::memory_order_relaxed);
  return k != nullptr;
}

}  // namespace saap
