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

INLINE float sign_of(int i) { return (uint32_t)(i + 1) * 0x9E3779B1u >> 31 ? -1.f : 1.f; }

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
template <class T, int H> INLINE void butterflies(T* part, int size) {
  using L = Lanes<T>;
  for (int i = 0; i < size; i += L::count) {
    typename L::type x;
    std::memcpy(&x, part + i, sizeof x);
    x = butterfly<H>(x, std::make_integer_sequence<int, L::count>{});
    std::memcpy(part + i, &x, sizeof x);
  }
}

// A Walsh-Hadamard transform of each block, powers of two that make up dim, in the order of additions that reference.rotate has.
template <class T> INLINE void hadamard(T* x, int dim) {
  using L = Lanes<T>;
  for (int start = 0, left = dim; left; ) {
    int size = 1;
    while (2 * size <= left) size *= 2;
    T* part = x + start;
    int half = 1;
    if (size >= L::count) {
      butterflies<T, 1>(part, size), half = 2;
      if constexpr (L::count > 2) butterflies<T, 2>(part, size), half = 4;
      if constexpr (L::count > 4) butterflies<T, 4>(part, size), half = 8;
      if constexpr (L::count > 8) butterflies<T, 8>(part, size), half = 16;
    }
    for (; half < size; half *= 2)
      for (int i = 0; i < size; i += 2 * half)
        for (int k = i; k < i + half;) {
          if (half >= L::count) {
            typename L::type a, b;
            std::memcpy(&a, part + k, sizeof a), std::memcpy(&b, part + k + half, sizeof b);
            const typename L::type sum = a + b, difference = a - b;
            std::memcpy(part + k, &sum, sizeof sum), std::memcpy(part + k + half, &difference, sizeof difference);
            k += L::count;
          } else {
            const T a = part[k], b = part[k + half];
            part[k] = a + b, part[k + half] = a - b;
            k++;
          }
        }
    const T scale = (T)(1 / std::sqrt((double)size));
    for (int i = 0; i < size; i++) part[i] *= scale;
    start += size, left -= size;
  }
}

void rotate_back(float* x, int dim) {
  hadamard(x, dim);
  for (int i = 0; i < dim; i++) x[i] *= sign_of(i);
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

// Every product below is of numbers whose significands together fit a double, so a fused multiplication rounds like two steps.
void encode4(const float* row, int dim, uint8_t* code) {
  alignas(64) double x[256], terms[256];
  alignas(64) float turned[256 + 8];
  alignas(64) int32_t number[256 + 8], level[256 + 8];
  for (int i = 0; i < dim; i++) x[i] = (double)(row[i] * sign_of(i));
  hadamard(x, dim);
  const double largest = 3.4028234663852886e38;
  for (int i = 0; i < dim; i++) {
    const double capped = x[i] > largest ? largest : x[i] < -largest ? -largest : x[i];
    turned[i] = (float)capped;
    terms[i] = (double)turned[i] * (double)turned[i];
  }
  const double unit = std::sqrt(pairwise_sum(terms, dim) / dim) / kGauss, divisor = unit > 0 ? unit : 1;
  float bounds[7];
  for (int k = 0; k < 7; k++) bounds[k] = last_below((kLevels[k] + kLevels[k + 1]) / 2.0, divisor);
  for (int i = dim; i < dim + 8; i++) turned[i] = 0;  // half a vector, at most
  vi squares{};  // whole, so in any order
  for (int i = 0; i < dim; i += W) {
    const vf x = load(turned + i), size = (vf)((vi)x & 0x7fffffff);
    const vi negative = x < vf{};
    vi index{}, positive = splat((int32_t)kLevels[0]);
    for (int k = 0; k < 7; k++) {
      const vi beyond = size > splat(bounds[k]);
      index -= beyond, positive += beyond & splat((int32_t)(kLevels[k + 1] - kLevels[k]));
    }
    const vi named = index + (negative & 8), signed_level = (positive ^ negative) - negative;
    std::memcpy(number + i, &named, sizeof named), std::memcpy(level + i, &signed_level, sizeof signed_level);
    squares += positive * positive;
  }
  int square_sum = -(dim % W) * kLevels[0] * kLevels[0];  // what the zeros behind the row were named
  for (int i = 0; i < W; i++) square_sum += squares[i];
  for (int i = 0; i < dim; i++) terms[i] = (double)turned[i] * level[i];
  const float scale = (float)(pairwise_sum(terms, dim) / square_sum);
  for (int start = 0; start < dim; start += kRun) {
    const int half = (dim - start < kRun ? dim - start : kRun) / 2;
    for (int i = 0; i < half; i++) code[start / 2 + i] = (uint8_t)(number[start + i] | number[start + half + i] << 4);
  }
  std::memcpy(code + dim / 2, &scale, sizeof scale);
}

// row: dim floats and zeros up to a multiple of W.
void encode(int bits, const float* row, int dim, uint8_t* code) {
  if (bits == 8) return encode8(row, dim, code);
  encode4(row, dim, code);
}
