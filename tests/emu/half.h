// Conversions between float and the 16-bit types, with the bits that the hardware gives.
#pragma once
#include "builtins.h"

namespace emu {

// Bits of the next smaller type below, with the sign apart; no arithmetic on subnormals, which the machine flushes.
inline float widen_half(u16 bits) {
#if defined(__F16C__)
  return static_cast<float>(emu::bits<_Float16>(bits));
#else
  u32 sign = static_cast<u32>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 0) return emu::bits<float>(emu::bits<u32>(static_cast<float>(fraction) * 0x1p-24f) | sign);
  return emu::bits<float>(sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | fraction << 13);
#endif
}

inline u16 narrow_half(float x) {
  u32 u = emu::bits<u32>(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return 0x7fff;
  if (a >= 0x477ff000) return static_cast<u16>(sign | 0x7c00);
  // Below 2^-14 the grid is 2^-24: the sum with 0.5 rounds to it.
  if (a < 0x38800000) return static_cast<u16>(sign | (emu::bits<u32>(emu::bits<float>(a) + .5f) - 0x3f000000));
  return static_cast<u16>(sign | (a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13);
}

inline float widen_bfloat(u16 bits) { return emu::bits<float>(static_cast<u32>(bits) << 16); }

inline u16 narrow_bfloat(float x) {
  u32 u = emu::bits<u32>(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<u16>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace emu

template <int T>
float widen(u16 bits) {
  static_assert(T == kBF16 || T == kF16, "a 16-bit type");
  return T == kBF16 ? emu::widen_bfloat(bits) : emu::widen_half(bits);
}
template <int T>
u16 narrow(float x) {
  static_assert(T == kBF16 || T == kF16, "a 16-bit type");
  return T == kBF16 ? emu::narrow_bfloat(x) : emu::narrow_half(x);
}
template <int T>
u32 narrow2(float lo, float hi) {
  return narrow<T>(lo) | static_cast<u32>(narrow<T>(hi)) << 16;
}


// By way of float, whose 24 bits are twice the 11 and two more: rounded twice as once.
inline u32 sub_f16x2(u32 a, u32 b) {
  const float low = widen<kF16>(static_cast<u16>(a)) - widen<kF16>(static_cast<u16>(b));
  const float high = widen<kF16>(static_cast<u16>(a >> 16)) - widen<kF16>(static_cast<u16>(b >> 16));
  return narrow2<kF16>(low, high);
}
