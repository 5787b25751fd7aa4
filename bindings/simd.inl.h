// Vectors of W floats in GCC/Clang vector extensions, and what the kernels need of them. Included once per instruction set,
// inside a namespace of its own, with W defined; the includes it needs stand in kernels.cpp.
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

constexpr int kLanes = W;
constexpr int kStep = 2 * W;  // elements that load2 widens

INLINE vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE vi load(const int32_t* p) { vi v; std::memcpy(&v, p, sizeof v); return v; }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat(int32_t x) { return x - vi{}; }
// Keeps the compiler from folding the load that gave v into each of its uses: AVX2's load ports are as busy as its multipliers.
INLINE vf in_register(vf v) {
#if W == 8
  asm("" : "+x"(v));
#endif
  return v;
}
INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// load2 widens 2W stored values into two vectors. 16-bit types without a widening load of their own come out as (even, odd)
// elements, which costs a shift and a mask instead of shuffles; `place` is where an element of such a group of 2W ends up.
template <class T> constexpr bool kEvenOdd = sizeof(T) == 2;
INLINE void load2(const float* p, vf& x, vf& y) { x = load(p); y = load(p + W); }
INLINE void load2(const bf16* p, vf& x, vf& y) {
  vu u;
  std::memcpy(&u, p, sizeof u);
  x = (vf)(u << 16);
  y = (vf)(u & 0xffff0000u);
}
#if W == 16 && !defined(SAAP_EMULATE_AVX512)
template <> constexpr bool kEvenOdd<f16> = false;
INLINE void load2(const f16* p, vf& x, vf& y) {
  x = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  y = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + W)));
}
#elif W == 8
template <> constexpr bool kEvenOdd<f16> = false;
INLINE void load2(const f16* p, vf& x, vf& y) {
  x = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  y = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + W)));
}
#else
// Finite values only: what the arena holds was checked on the way in.
INLINE vf widen_half(vu u) { return (vf)((u & 0x7fff) << 13) * (vf)(vu{} + 0x77800000u) * (vf)((u & 0x8000) << 16 | 0x3f800000u); }
INLINE void load2(const f16* p, vf& x, vf& y) {
  vu u;
  std::memcpy(&u, p, sizeof u);
  x = widen_half(u & 0xffff);
  y = widen_half(u >> 16);
}
#endif
template <class T> INLINE int place(int i) { return kEvenOdd<T> ? (i % 2) * W + i / 2 : i; }

// The last n < 2W values of a row, zeros after them: reading on would leave the row, and its array at the end.
template <class T> INLINE void load2_tail(const T* p, int n, vf& x, vf& y) {
  alignas(64) T buffer[kStep] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8) std::memcpy(buffer + i, p + i, 8 * sizeof(T));
  for (; i < n; i++) buffer[i] = p[i];
  load2(buffer, x, y);
}

template <int H, int... I> INLINE vf fold_lanes(vf x, vf y, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, y, (I % (2 * H) < H ? I : W + I - H)...) +
         __builtin_shufflevector(x, y, (I % (2 * H) < H ? I + H : W + I)...);
}
template <int H, int... I> INLINE vf xor_lanes(vf x, std::integer_sequence<int, I...>) { return __builtin_shufflevector(x, x, (I ^ H)...); }
template <int H> INLINE vf swap_lanes(vf x) { return xor_lanes<H>(x, std::make_integer_sequence<int, W>{}); }

// Lane i becomes the sum of the lanes of a[i]; all W sums in W - 1 additions. Overwrites a.
template <int H = W / 2> INLINE vf sums_of(vf* a) {
  for (int i = 0; i < H; i++) a[i] = fold_lanes<H>(a[i], a[i + H], std::make_integer_sequence<int, W>{});
  if constexpr (H > 1) return sums_of<H / 2>(a);
  else return a[0];
}

// Every lane becomes the maximum (sum) over the lanes that agree with it modulo G.
template <int G, int H = W / 2> INLINE vf max_modulo(vf x) {
  if constexpr (H >= G) return max_modulo<G, H / 2>(maximum(x, swap_lanes<H>(x)));
  else return x;
}
template <int G, int H = W / 2> INLINE vf sum_modulo(vf x) {
  if constexpr (H >= G) return sum_modulo<G, H / 2>(x + swap_lanes<H>(x));
  else return x;
}

// 2^x for x <= 0 with a relative error below 3e-7; exactly 0 from -126 down. Adding and subtracting 1.5 * 2^23 rounds to the
// nearest integer, which -ffast-math would undo.
INLINE vf exp2_nonpositive(vf x) {
  vf t = x + splat(12582912.f);
  vu exponent = (vu)t << 23;  // unsigned: below -126 the sum wraps round, and is not used
  vf f = x - (t - splat(12582912.f));
  vf p = splat(1.540353e-4f);
  p = p * f + splat(1.3333558e-3f);
  p = p * f + splat(9.6181291e-3f);
  p = p * f + splat(5.5504109e-2f);
  p = p * f + splat(2.4022651e-1f);
  p = p * f + splat(6.9314718e-1f);
  p = p * f + splat(1.f);
  return (vf)((vi)((vu)p + exponent) & (x > splat(-126.f)));
}
