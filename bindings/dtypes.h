// The storage types and their conversion to and from float, one element at a time; the vectorised loads are in simd.inl.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace saap {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, u8 = 3 };  // u8: bytes, which nothing computes with

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline size_t size_of(DType t) { return t == DType::f32 ? 4 : t == DType::u8 ? 1 : 2; }

inline float bit_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // A multiplication by 2^112 moves the exponent's bias and is exact for subnormals too.
  float f = rest < 0x7c00 ? bit_float(rest << 13) * bit_float(0x77800000) : bit_float(rest << 13 | 0x7f800000);
  return bit_float(float_bits(f) | sign);
}

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  uint32_t u = float_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(u >> 16 | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
  uint32_t u = float_bits(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (a >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  // Below 2^-14 the sum with 0.5 lets the adder round to the subnormal grid of 2^-24.
  if (a < 0x38800000) return {static_cast<uint16_t>(sign | (float_bits(bit_float(a) + 0.5f) - 0x3f000000))};
  return {static_cast<uint16_t>(sign | ((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13))};
}

// Calls f with a value of the storage type that t names.
template <class F> auto with_type(DType t, F&& f) {
  switch (t) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default: return f(float{});
  }
}

}  // namespace saap
