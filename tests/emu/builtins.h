// What CUDA C++ provides without a header, but for what involves several threads.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define EMU_VECTOR(name, element, bytes2, bytes4)                                                              \
  struct alignas(bytes2) name##2 { element x, y; };                                                            \
  struct name##3 { element x, y, z; };                                                                         \
  struct alignas(bytes4) name##4 { element x, y, z, w; };                                                      \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }                                       \
  inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; }                         \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
EMU_VECTOR(int, int, 8, 16)
EMU_VECTOR(uint, unsigned, 8, 16)
EMU_VECTOR(float, float, 8, 16)
EMU_VECTOR(ushort, unsigned short, 4, 8)
#undef EMU_VECTOR

namespace emu {
EMU_UNSEEN uint3 thread_index() { return {running.thread, 0, 0}; }
EMU_UNSEEN dim3 block_index() { return running.index; }
EMU_UNSEEN dim3 block_size() { return running.block; }
EMU_UNSEEN dim3 grid_size() { return running.grid; }
}  // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
constexpr int warpSize = 32;

// Rises, and tells nothing of time.
EMU_UNSEEN long long clock64() {
  static long long ticks = 0;
  return ++ticks;
}

// ---- bits

namespace emu {
template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace emu

inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned y = 0;
  for (int i = 0; i < 4; i++) {
    unsigned s = selector >> 4 * i, byte = static_cast<unsigned>(both >> 8 * (s & 7)) & 0xff;
    y |= (s & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return y;
}

// ---- numbers

namespace emu {
// Out of range saturates and NaN gives 0, as the hardware converts.
inline int to_int(float x) {
  return x != x ? 0 : x >= 2147483648.f ? INT32_MAX : x <= -2147483648.f ? INT32_MIN : static_cast<int>(x);
}
inline unsigned to_unsigned(float x) {
  return !(x > 0) ? 0 : x >= 4294967296.f ? UINT32_MAX : static_cast<unsigned>(x);
}
}  // namespace emu

inline int __float2int_rd(float x) { return emu::to_int(floorf(x)); }
inline int __float2int_ru(float x) { return emu::to_int(ceilf(x)); }
inline int __float2int_rn(float x) { return emu::to_int(rintf(x)); }
inline int __float2int_rz(float x) { return emu::to_int(truncf(x)); }
inline unsigned __float2uint_rd(float x) { return emu::to_unsigned(floorf(x)); }
inline unsigned __float2uint_rn(float x) { return emu::to_unsigned(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return emu::to_unsigned(truncf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
// These are never contracted with what stands around them.
#define EMU_ROUNDED(name, expression)                                                          \
  __attribute__((optimize("fp-contract=off"))) inline float name(float a, float b) {           \
    volatile float r = expression;                                                             \
    return r;                                                                                  \
  }
EMU_ROUNDED(__fadd_rn, a + b)
EMU_ROUNDED(__fsub_rn, a - b)
EMU_ROUNDED(__fmul_rn, a* b)
EMU_ROUNDED(__fdiv_rn, a / b)
#undef EMU_ROUNDED
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.f) : 0.f; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  double a = 3.14159265358979323846 * (x - 2. * rint(.5 * x));
  *sine = static_cast<float>(sin(a)), *cosine = static_cast<float>(cos(a));
}

#define EMU_MIN_MAX(type)                                       \
  inline type min(type a, type b) { return b < a ? b : a; }     \
  inline type max(type a, type b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
