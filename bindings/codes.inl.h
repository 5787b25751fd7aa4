// Rows of codes: made from rows of numbers, and read by the scan as they lie. Included once per instruction set, after scan.inl.h.
//
// A code is what reference.py calls one: the numbers of a row, then a float scale. Numbers of 8 bits are signed bytes. Of 4 bits, two
// share a byte: of each 32 numbers the first 16 in the lower halves of 16 bytes, the others in the upper ones; at the end, halves of
// what is left; each names one of kLevels. Products are formed with the whole numbers, widened in registers, and the scale of a row
// multiplies its score or its weight, so a row costs its bytes and one multiplication more than its arithmetic.
constexpr int kScaleBytes = 4;
constexpr int kRun = 32;  // numbers of 4 bits in 16 bytes
alignas(16) constexpr int8_t kLevels[16] = {6, 18, 31, 44, 58, 75, 96, 127, -6, -18, -31, -44, -58, -75, -96, -127};
constexpr double kGauss = 46.476;  // kLevels per deviation of the numbers

template <int BITS> INLINE constexpr int code_bytes(int dim) { return dim * BITS / 8 + kScaleBytes; }
template <int BITS> INLINE float scale_of(const uint8_t* code, int dim) {
  float x;
  std::memcpy(&x, code + dim * BITS / 8, sizeof x);
  return x;
}

typedef int8_t vb __attribute__((vector_size(W)));
INLINE vf widen(const int8_t* p) {
#if W == 16 && !defined(SAAP_EMULATE_AVX512)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif W == 8
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vb b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}

// Numbers [j, j + kStep) of a row, j a multiple of kStep; of 4 bits, within a whole run.
template <int BITS> INLINE void load_numbers(const uint8_t* code, int j, vf& x, vf& y) {
  if constexpr (BITS == 8) {
    x = widen((const int8_t*)code + j), y = widen((const int8_t*)code + j + W);
  } else {
    const uint8_t* run = code + j / kRun * (kRun / 2);
#if W == 16 && !defined(SAAP_EMULATE_AVX512)
    const __m128i bytes = _mm_loadu_si128((const __m128i*)run), low = _mm_set1_epi8(15), levels = _mm_load_si128((const __m128i*)kLevels);
    x = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(levels, _mm_and_si128(bytes, low))));
    y = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(levels, _mm_and_si128(_mm_srli_epi16(bytes, 4), low))));
#elif W == 8
    __m128i bytes = _mm_loadu_si128((const __m128i*)run);
    if (j % kRun) bytes = _mm_srli_epi16(bytes, 4);
    const __m128i numbers = _mm_shuffle_epi8(_mm_load_si128((const __m128i*)kLevels), _mm_and_si128(bytes, _mm_set1_epi8(15)));
    x = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(numbers));
    y = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(numbers, 8)));
#else
    const int at = j % kRun % 16, shift = j % kRun / 16 * 4;
    x = vf{}, y = vf{};
    for (int i = 0; i < W; i++) {
      // 2W may be more than the 16 numbers of half a run
      const int k = at + i, m = at + W + i;
      x[i] = kLevels[run[k % 16] >> (shift + k / 16 * 4) & 15];
      y[i] = kLevels[run[m % 16] >> (shift + m / 16 * 4) & 15];
    }
#endif
  }
}

// The numbers of a row from `from` on, which fill no whole step, then zeros.
template <int BITS> INLINE void load_rest(const uint8_t* code, int from, int dim, float* out) {
  const int n = dim - from;
  for (int i = 0; i < 2 * kRun; i++) out[i] = 0;
  if constexpr (BITS == 8) {
    for (int i = 0; i < n; i++) out[i] = (int8_t)code[from + i];
  } else {
    for (int i = 0; i < n / 2; i++) out[i] = kLevels[code[from / 2 + i] & 15], out[n / 2 + i] = kLevels[code[from / 2 + i] >> 4];
  }
}

// Numbers that load_numbers reads; the rest come from load_rest.
template <int BITS> INLINE constexpr int whole_steps(int dim) {
  constexpr int unit = BITS == 8 || kStep > kRun ? kStep : kRun;
  return dim / unit * unit;
}

// As score_block, of keys of 8 bits.
template <int BITS, int D, int G>
INLINE void score_codes(const ScanItem& it, const float* q, const int32_t* rows, int n, bool fetch, float* s) {
  constexpr int R = W / G;
  const int d = D ? D : it.d, dp = D ? D : it.dp, whole = D ? D : whole_steps<8>(it.d);
  const uint8_t* k = (const uint8_t*)it.k;
  const char* v = (const char*)it.v;
  const int v_bytes = code_bytes<BITS>(D ? D : it.e);
  for (int t = 0; t < n; t += R) {
    vf sum[W] = {};
    const uint8_t* row[R];
    for (int i = 0; i < R; i++) row[i] = k + (int64_t)rows[t + i] * code_bytes<8>(d);
    for (int j = 0; j < whole; j += kStep) {
      vf x[R], y[R];
      for (int i = 0; i < R; i++) load_numbers<8>(row[i], j, x[i], y[i]);
      for (int g = 0; g < G; g++) {
        vf qx = load(q + g * dp + j), qy = load(q + g * dp + j + W);
        if constexpr (R > 1) qx = in_register(qx), qy = in_register(qy);
        for (int i = 0; i < R; i++) {
          sum[i * G + g] += x[i] * qx;
          sum[i * G + g] += y[i] * qy;
        }
      }
    }
    if (D == 0 && whole < d) {
      alignas(64) float rest[2 * kRun];
      for (int i = 0; i < R; i++) {
        load_rest<8>(row[i], whole, d, rest);
        for (int g = 0; g < G; g++) sum[i * G + g] += load(rest) * load(q + g * dp + whole) + load(rest + W) * load(q + g * dp + whole + W);
      }
    }
    alignas(64) float scales[W];
    for (int i = 0; i < R; i++) {
      const float scale = scale_of<8>(row[i], d);
      for (int g = 0; g < G; g++) scales[i * G + g] = scale;
    }
    for (int i = 0; fetch && i < R; i++) prefetch(v + (int64_t)rows[kBlock + t + i] * v_bytes, v_bytes);
    store(s + t * G, sums_of(sum) * load(scales));
  }
}

// As add_values; the weights are multiplied by the scales of their rows.
template <int BITS, int D, int G>
INLINE void add_codes(const ScanItem& it, float* w, const int32_t* rows, int n, bool fetch, float* acc) {
  constexpr int P = G > 4 ? 4 : G;
  constexpr int B = P == 1 ? 4 : P == 2 ? 4 : 2;
  const int e = D ? D : it.e, ep = D ? D : it.ep, whole = D ? D : whole_steps<BITS>(it.e);
  const uint8_t* v = (const uint8_t*)it.v;
  const char* k = (const char*)it.k;
  const int v_bytes = code_bytes<BITS>(e), k_bytes = code_bytes<8>(D ? D : it.d);
  for (int t = 0; t < n; t++) {
    const float scale = scale_of<BITS>(v + (int64_t)rows[t] * v_bytes, e);
    for (int g = 0; g < G; g++) w[t * G + g] *= scale;
  }
  auto columns = [&](auto width, int j, int g0) __attribute__((always_inline)) {
    constexpr int b_count = decltype(width)::value;
    for (int i = kBlock * j / ep; fetch && g0 == 0 && i < kBlock * (j + b_count * W) / ep; i++)
      prefetch(k + (int64_t)rows[kKeysAhead<G> * kBlock + i] * k_bytes, k_bytes);
    vf a[P][b_count];
    for (int g = 0; g < P; g++)
      for (int b = 0; b < b_count; b++) a[g][b] = load(acc + (g0 + g) * ep + j + b * W);
    for (int i = 0; i < n; i++) {
      vf x[b_count];
      for (int b = 0; b < b_count; b += 2) load_numbers<BITS>(v + (int64_t)rows[i] * v_bytes, j + b * W, x[b], x[b + 1]);
      for (int g = 0; g < P; g++) {
        vf p = splat(w[i * G + g0 + g]);
        for (int b = 0; b < b_count; b++) a[g][b] += p * x[b];
      }
    }
    for (int g = 0; g < P; g++)
      for (int b = 0; b < b_count; b++) store(acc + (g0 + g) * ep + j + b * W, a[g][b]);
  };
  for (int g0 = 0; g0 < G; g0 += P) {
    int j = 0;
    for (; j + B * W <= whole; j += B * W) columns(std::integral_constant<int, B>{}, j, g0);
    for (; j < whole; j += kStep) columns(std::integral_constant<int, 2>{}, j, g0);
  }
  if (D == 0 && whole < e) {
    alignas(64) float rest[2 * kRun];
    for (int i = 0; i < n; i++) {
      load_rest<BITS>(v + (int64_t)rows[i] * v_bytes, whole, e, rest);
      for (int g = 0; g < G; g++) {
        vf p = splat(w[i * G + g]);
        float* a = acc + g * ep + whole;
        for (int j = 0; j < ep - whole; j += W) store(a + j, load(a + j) + p * load(rest + j));
      }
    }
  }
}

template <int BITS> struct CodedRows {
  INLINE const char* key(const ScanItem& it, int32_t row) { return (const char*)it.k + (int64_t)row * key_bytes(it); }
  INLINE const char* value(const ScanItem& it, int32_t row) { return (const char*)it.v + (int64_t)row * value_bytes(it); }
  INLINE int key_bytes(const ScanItem& it) { return code_bytes<8>(it.d); }
  INLINE int value_bytes(const ScanItem& it) { return code_bytes<BITS>(it.e); }
  template <int D, int G> INLINE void score(const ScanItem& it, const float* q, const int32_t* rows, int n, bool fetch, float* s) {
    score_codes<BITS, D, G>(it, q, rows, n, fetch, s);
  }
  template <int D, int G> INLINE void add(const ScanItem& it, float* w, const int32_t* rows, int n, bool fetch, float* acc) {
    add_codes<BITS, D, G>(it, w, rows, n, fetch, acc);
  }
};

template <int BITS> void scan_coded_dims(const ScanItem& it) {
#if W >= 8
  if (it.d == 64 && it.e == 64) return scan_group<CodedRows<BITS>, 64>(it);
  if (it.d == 128 && it.e == 128) return scan_group<CodedRows<BITS>, 128>(it);
#endif
  scan_group<CodedRows<BITS>, 0>(it);
}

void scan_codes(int value_bits, const ScanItem& it) {
  if (value_bits == 8) return scan_coded_dims<8>(it);
  scan_coded_dims<4>(it);
}

// -- making codes -----------------------------------------------------------------------------------------------------------

struct Signs {
  alignas(64) float of[256];
  constexpr Signs() : of() {
    for (int i = 0; i < 256; i++) of[i] = (uint32_t)(i + 1) * 0x9E3779B1u >> 31 ? -1.f : 1.f;
  }
};
constexpr Signs kSigns;

// Numbers of type T in vectors of whole registers.
template <class T> struct Lanes {
  typedef T type __attribute__((vector_size(W * 4)));
  static constexpr int count = W * 4 / (int)sizeof(T);
};

// Of pairs of lanes that differ by H the sum in the lower, the difference in the upper one: x + y where the latter is y - x.
template <int H, class V, int... I> INLINE V butterfly(V x, std::integer_sequence<int, I...>) {
  constexpr V one = {(I & H ? -1 : 1)...};
  return __builtin_shufflevector(x, x, (I ^ H)...) + x * one;
}
// The stages within a vector.
template <class V, int... I> INLINE V lane_stages(V x, std::integer_sequence<int, I...> lanes) {
  constexpr int count = sizeof...(I);
  x = butterfly<1>(x, lanes);
  if constexpr (count > 2) x = butterfly<2>(x, lanes);
  if constexpr (count > 4) x = butterfly<4>(x, lanes);
  if constexpr (count > 8) x = butterfly<8>(x, lanes);
  return x;
}

// The stages of a Walsh-Hadamard transform of `size` numbers from distance `half` on, a multiple of the lanes, two at a time so that
// numbers are read half as often, and what comes out times scale.
template <class T> INLINE void wide_stages(T* x, int size, int half, T scale) {
  using L = Lanes<T>;
  typedef typename L::type V;
  auto get = [&](int i) __attribute__((always_inline)) { V v; std::memcpy(&v, x + i, sizeof v); return v; };
  auto put = [&](int i, V v) __attribute__((always_inline)) { std::memcpy(x + i, &v, sizeof v); };
  const V factor = scale - V{};
  for (; 2 * half < size; half *= 4) {
    const bool last = 4 * half >= size;
    for (int i = 0; i < size; i += 4 * half)
      for (int k = i; k < i + half; k += L::count) {
        const V a = get(k), b = get(k + half), c = get(k + 2 * half), d = get(k + 3 * half);
        const V s = a + b, t = a - b, u = c + d, v = c - d;
        V w = s + u, y = t + v, z = s - u, e = t - v;
        if (last) w *= factor, y *= factor, z *= factor, e *= factor;
        put(k, w), put(k + half, y), put(k + 2 * half, z), put(k + 3 * half, e);
      }
  }
  if (half < size)
    for (int k = 0; k < half; k += L::count) {
      const V a = get(k), b = get(k + half);
      put(k, (a + b) * factor), put(k + half, (a - b) * factor);
    }
}

// x (dim) = a Walsh-Hadamard transform of each block, powers of two that make up dim, of the numbers that get(i) has as [i, i + lanes),
// in the order of additions that reference.rotate has. What get has past the row is written behind it.
template <class T, class Get> INLINE void hadamard(T* x, int dim, Get&& get) {
  using L = Lanes<T>;
  for (int start = 0, left = dim; left; ) {
    int size = 1;
    while (2 * size <= left) size *= 2;
    T* part = x + start;
    const T scale = (T)(1 / std::sqrt((double)size));
    if (size > L::count) {
      for (int i = 0; i < size; i += L::count) {
        const typename L::type v = lane_stages(get(start + i), std::make_integer_sequence<int, L::count>{});
        std::memcpy(part + i, &v, sizeof v);
      }
      wide_stages(part, size, L::count, scale);
    } else {
      for (int i = 0; i < size; i += L::count) {
        const typename L::type v = get(start + i);
        std::memcpy(part + i, &v, sizeof v);
      }
      for (int half = 1; half < size; half *= 2)
        for (int i = 0; i < size; i += 2 * half)
          for (int k = i; k < i + half; k++) {
            const T a = part[k], b = part[k + half];
            part[k] = a + b, part[k + half] = a - b;
          }
      for (int i = 0; i < size; i++) part[i] *= scale;
    }
    start += size, left -= size;
  }
}

void rotate_back(float* x, int dim) {
  hadamard(x, dim, [&](int i) __attribute__((always_inline)) { return load(x + i); });
  for (int i = 0; i < dim; i++) x[i] *= kSigns.of[i];
}

// The second half added to the first until one is left. Overwrites x, which has room for a power of two.
INLINE double pairwise_sum(double* x, int dim) {
  int size = 1;
  while (size < dim) size *= 2;
  for (int i = dim; i < size; i++) x[i] = 0;
  using L = Lanes<double>;
  for (; size >= 2 * L::count; size /= 2)
    for (int i = 0; i < size / 2; i += L::count) {
      typename L::type a, b;
      std::memcpy(&a, x + i, sizeof a), std::memcpy(&b, x + i + size / 2, sizeof b);
      a += b;
      std::memcpy(x + i, &a, sizeof a);
    }
  for (; size > 1; size /= 2)
    for (int i = 0; i < size / 2; i++) x[i] += x[i + size / 2];
  return x[0];
}

// Whole numbers from -127 to 127 as bytes; n, 8 or at least W, of them.
INLINE void store_bytes(vf x, uint8_t* out, int n) {
#if W == 16 && !defined(SAAP_EMULATE_AVX512)
  const __m128i b = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x));
  if (n >= W) _mm_storeu_si128((__m128i*)out, b);
  else _mm_storel_epi64((__m128i*)out, b);
#elif W == 8
  const __m256i i = _mm256_cvtps_epi32((__m256)x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64((__m128i*)out, _mm_packs_epi16(words, words));
#else
  const vb b = __builtin_convertvector(__builtin_convertvector(x, vi), vb);
  std::memcpy(out, &b, n < W ? W / 2 : W);
#endif
}

void encode8(const float* row, int dim, uint8_t* code) {
  vf top{};
  for (int j = 0; j < dim; j += W) top = maximum(top, (vf)((vi)load(row + j) & 0x7fffffff));
  const float scale = max_modulo<1>(top)[0] / 127.f;
  const vf divisor = splat(scale > 0 ? scale : 1), lowest = splat(scale > 0 ? -127.f : 0.f), highest = splat(scale > 0 ? 127.f : 0.f);
  for (int j = 0; j < dim; j += W) {
    vf t = load(row + j) / divisor;
    t = (t + splat(12582912.f)) - splat(12582912.f);
    t = maximum(lowest, t < highest ? t : highest);
    store_bytes(t, code + j, dim - j);
  }
  std::memcpy(code + dim, &scale, sizeof scale);
}

// The largest float that a level's upper bound leaves to it: of floats x > 0 those with x / divisor > bound are the larger ones.
// Quotients grow with x, and only the float nearest to bound * divisor needs one.
INLINE float last_below(double bound, double divisor) {
  const float near = (float)(bound * divisor);
  int32_t bits;
  std::memcpy(&bits, &near, sizeof bits);
  bits -= near / divisor > bound;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// How many of 7 ascending bounds each x >= 0 is beyond, and kLevels there.
struct Bounds {
  alignas(64) float of[8];
};
INLINE void find_level(vf x, const Bounds& bounds, vi& index, vi& level) {
#if W == 8
  const __m256 all = _mm256_load_ps(bounds.of);
  const __m256i levels = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)kLevels));
  __m256i i = _mm256_and_si256((__m256i)(x > splat(bounds.of[3])), _mm256_set1_epi32(4));
  const vf second = (vf)_mm256_permutevar8x32_ps(all, _mm256_add_epi32(i, _mm256_set1_epi32(1)));
  i = _mm256_add_epi32(i, _mm256_and_si256((__m256i)(x > second), _mm256_set1_epi32(2)));
  const vf third = (vf)_mm256_permutevar8x32_ps(all, i);
  i = _mm256_sub_epi32(i, (__m256i)(x > third));
  index = (vi)i;
  level = (vi)_mm256_permutevar8x32_epi32(levels, i);
#else
  index = vi{}, level = splat((int32_t)kLevels[0]);
  for (int k = 0; k < 7; k++) {
    const vi beyond = x > splat(bounds.of[k]);
    index -= beyond, level += beyond & splat((int32_t)(kLevels[k + 1] - kLevels[k]));
  }
#endif
}

// Numbers below 256 as bytes.
INLINE void store_low_bytes(vi x, uint8_t* out) {
#if W == 16 && !defined(SAAP_EMULATE_AVX512)
  _mm_storeu_si128((__m128i*)out, _mm512_maskz_cvtepi32_epi8((__mmask16)-1, (__m512i)x));
#elif W == 8
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64((__m128i*)out, _mm_packus_epi16(words, words));
#else
  const vb b = __builtin_convertvector(x, vb);
  std::memcpy(out, &b, sizeof b);
#endif
}

typedef Lanes<double>::type vd;
constexpr int kDoubles = Lanes<double>::count;
typedef float half_vf __attribute__((vector_size(kDoubles * 4)));
typedef int32_t half_vi __attribute__((vector_size(kDoubles * 4)));
#if W == 16 && !defined(SAAP_EMULATE_AVX512)
INLINE vd widen(half_vf x) { return (vd)_mm512_maskz_cvtps_pd((__mmask8)-1, (__m256)x); }
INLINE vd widen(half_vi x) { return (vd)_mm512_maskz_cvtepi32_pd((__mmask8)-1, (__m256i)x); }
INLINE half_vf narrow(vd x) { return (half_vf)_mm512_maskz_cvtpd_ps((__mmask8)-1, (__m512d)x); }
#elif W == 8  // what GCC makes of __builtin_convertvector takes twice as long
INLINE vd widen(half_vf x) { return (vd)_mm256_cvtps_pd((__m128)x); }
INLINE vd widen(half_vi x) { return (vd)_mm256_cvtepi32_pd((__m128i)x); }
INLINE half_vf narrow(vd x) { return (half_vf)_mm256_cvtpd_ps((__m256d)x); }
#else
INLINE vd widen(half_vf x) { return __builtin_convertvector(x, vd); }
INLINE vd widen(half_vi x) { return __builtin_convertvector(x, vd); }
INLINE half_vf narrow(vd x) { return __builtin_convertvector(x, half_vf); }
#endif
INLINE vd load_doubles(const float* p) { half_vf v; std::memcpy(&v, p, sizeof v); return widen(v); }
INLINE vd load_doubles(const int32_t* p) { half_vi v; std::memcpy(&v, p, sizeof v); return widen(v); }
INLINE vd load_doubles(const double* p) { vd v; std::memcpy(&v, p, sizeof v); return v; }
INLINE void store_doubles(double* p, vd v) { std::memcpy(p, &v, sizeof v); }

// pairwise_sum of what term(i) says of numbers [i, i + kDoubles), i a multiple of that. Of a power of two the first two halvings are
// done on the way. x: room for 256 + kDoubles.
template <class Term> INLINE double sum_terms(double* x, int dim, Term&& term) {
  if (dim & (dim - 1) || dim < 4 * kDoubles) {
    for (int i = 0; i < dim; i += kDoubles) store_doubles(x + i, term(i));
    return pairwise_sum(x, dim);
  }
  const int quarter = dim / 4;
  for (int i = 0; i < quarter; i += kDoubles)
    store_doubles(x + i, (term(i) + term(i + 2 * quarter)) + (term(i + quarter) + term(i + 3 * quarter)));
  return pairwise_sum(x, quarter);
}

// Several rows at a time, so that none waits for the sum, the root and the quotients of another. Every product below is of numbers
// whose significands together fit a double, so a fused multiplication rounds like two steps.
void encode4(const float* rows, int64_t stride, int n, int dim, uint8_t* codes) {
  alignas(64) double x[256 + 16], terms[256 + 16];
  alignas(64) float turned[kEncodeRows][256 + 16];
  alignas(64) int32_t number[256 + 16], level[256 + 16];
  double divisors[kEncodeRows];
  Bounds bounds[kEncodeRows];
  const vd largest = 3.4028234663852886e38 - vd{};
  for (int r = 0; r < n; r++) {
    hadamard(x, dim, [&](int i) __attribute__((always_inline)) {  // past the row there are zeros
      half_vf a, b;
      std::memcpy(&a, rows + r * stride + i, sizeof a), std::memcpy(&b, kSigns.of + i, sizeof b);
      return widen(a * b);
    });
    divisors[r] = sum_terms(terms, dim, [&](int i) __attribute__((always_inline)) {
      vd wide = load_doubles(x + i);
      wide = wide > largest ? largest : wide;
      wide = wide < -largest ? -largest : wide;
      const half_vf rounded = narrow(wide);
      std::memcpy(turned[r] + i, &rounded, sizeof rounded);
      wide = widen(rounded);
      return wide * wide;
    });
    for (int i = dim; i < dim + 16; i++) turned[r][i] = 0;  // a vector, at most
  }
  for (int r = 0; r < n; r++) {
    const double unit = std::sqrt(divisors[r] / dim) / kGauss;
    divisors[r] = unit > 0 ? unit : 1;
  }
  for (int r = 0; r < n; r++)
    for (int k = 0; k < 8; k++) bounds[r].of[k] = k < 7 ? last_below((kLevels[k] + kLevels[k + 1]) / 2.0, divisors[r]) : 0;
  for (int r = 0; r < n; r++) {
    uint8_t* code = codes + (int64_t)r * code_bytes<4>(dim);
    vi squares{};  // whole, so in any order
    for (int i = 0; i < dim; i += W) {
      const vf x = load(turned[r] + i);
      const vi negative = x < vf{};
      vi index, positive;
      find_level((vf)((vi)x & 0x7fffffff), bounds[r], index, positive);
      const vi named = index + (negative & 8), signed_level = (positive ^ negative) - negative;
      std::memcpy(number + i, &named, sizeof named), std::memcpy(level + i, &signed_level, sizeof signed_level);
      squares += positive * positive;
    }
    int square_sum = -((W - dim % W) % W) * kLevels[0] * kLevels[0];  // what the zeros behind the row were named
    for (int i = 0; i < W; i++) square_sum += squares[i];
    const double product =
        sum_terms(terms, dim, [&](int i) __attribute__((always_inline)) { return load_doubles(turned[r] + i) * load_doubles(level + i); });
    const float scale = (float)(product / square_sum);
    int start = 0;
    for (; start + kRun <= dim; start += kRun)
      for (int i = 0; i < kRun / 2; i += W) {
        vi low, high;
        std::memcpy(&low, number + start + i, sizeof low), std::memcpy(&high, number + start + kRun / 2 + i, sizeof high);
        store_low_bytes(low | high << 4, code + start / 2 + i);
      }
    const int half = (dim - start) / 2;
    for (int i = 0; i < half; i++) code[start / 2 + i] = (uint8_t)(number[start + i] | number[start + half + i] << 4);
    std::memcpy(code + dim / 2, &scale, sizeof scale);
  }
}

void encode(int bits, const float* rows, int64_t stride, int n, int dim, uint8_t* codes) {
  if (bits == 4) return encode4(rows, stride, n, dim, codes);
  for (int r = 0; r < n; r++) encode8(rows + r * stride, dim, codes + (int64_t)r * code_bytes<8>(dim));
}
