// The weights of the runs of one head, see ProbeHead in kernels.h. exp(z + a) is formed as exp(z) exp(a), each relative to its
// maximum: j * (l + s) exponentials instead of j * l * s.
constexpr float kLog2E = 1.44269504f;

// e (n) = exp(x - max x), e (padded) = 0 beyond n.
INLINE void exp_row(const float* x, int n, int padded, float* e) {
  float top = -INFINITY;
  vf tops = splat(top);
  int i = 0;
  for (; i + W <= n; i += W) tops = maximum(tops, load(x + i));
  for (; i < n; i++) top = x[i] > top ? x[i] : top;
  for (int lane = 0; lane < W; lane++) top = tops[lane] > top ? tops[lane] : top;
  for (i = 0; i + W <= n; i += W) store(e + i, exp2_nonpositive((load(x + i) - splat(top)) * splat(kLog2E)));
  if (i < n) {
    alignas(64) float block[W] = {};
    std::memcpy(block, x + i, sizeof(float) * (n - i));
    store(block, exp2_nonpositive((load(block) - splat(top)) * splat(kLog2E)));
    std::memcpy(e + i, block, sizeof(float) * (n - i));
  }
  for (i = n; i < padded; i++) e[i] = 0;
}

INLINE float sum_lanes(vf x) {
  float sum = 0;
  for (int lane = 0; lane < W; lane++) sum += x[lane];
  return sum;
}

// Run lengths of lists [i, i + W) as floats; the table ends at n, so the last ones are read one by one.
INLINE vf run_lengths(const int32_t* table, int i, int n) {
  if (i + W <= n) return to_float(load(table + i + 1) - load(table + i));
  alignas(64) float length[W] = {};
  for (int k = i; k < n; k++) length[k - i] = (float)(table[k + 1] - table[k]);
  return load(length);
}

// A normal sum of at least this much leaves room for weights of single runs 20 orders of magnitude below.
constexpr float kLeastSum = 1e-15f;

// The lanes of total (4) add up to more by the sum over the runs of one segment of length * e, times c (4), for columns j to j + 4
// (those past the last repeat it).
INLINE void add_segment(const ProbeHead& h, const int32_t* table, int j, const float* c, vf* total) {
  const float* e[4];
  for (int k = 0; k < 4; k++) e[k] = h.e + (int64_t)(j + k < h.j ? j + k : h.j - 1) * h.lp;
  vf sum[4] = {};
  for (int i = 0; i < h.l; i += W) {
    vf n = run_lengths(table, i, h.l);
    for (int k = 0; k < 4; k++) sum[k] += n * load(e[k] + i);
  }
  for (int k = 0; k < 4; k++) total[k] += sum[k] * splat(c[k]);
}

// w (s, lp) = sum over the columns of e times c, 0 for empty runs. J: h.j, or 0 for any.
template <int J>
INLINE void add_columns(const ProbeHead& h, float* w) {
  for (int s = 0; s < h.s; s++) {
    const int32_t* table = h.tables + (int64_t)s * (h.l + 1);
    float* out = w + (int64_t)s * h.lp;
    vf c[J ? J : 1];
    for (int j = 0; j < J; j++) c[j] = splat(h.c[(int64_t)j * h.s + s]);
    for (int i = 0; i < h.lp; i += W) {
      vf sum{};
      if constexpr (J > 0) {
        for (int j = 0; j < J; j++) sum += load(h.e + (int64_t)j * h.lp + i) * c[j];
      } else {
        for (int j = 0; j < h.j; j++) sum += load(h.e + (int64_t)j * h.lp + i) * splat(h.c[(int64_t)j * h.s + s]);
      }
      store(out + i, run_lengths(table, i, h.l) > vf{} ? sum : vf{});
    }
  }
}

bool run_weights(const ProbeHead& h, float* w) {
  for (int j = 0; j < h.j; j++) exp_row(h.z + (int64_t)j * h.l, h.l, h.lp, h.e + (int64_t)j * h.lp);
  for (int j0 = 0; j0 < h.j; j0 += 4) {
    const int some = h.j - j0 < 4 ? h.j - j0 : 4;
    float total[4] = {};
    for (int j = j0; j < j0 + some; j++) {
      float* c = h.c + (int64_t)j * h.s;
      if (h.size_weighted) exp_row(h.a + (int64_t)j * h.s, h.s, h.s, c);
      else
        for (int s = 0; s < h.s; s++) c[s] = 1;
    }
    if (h.size_weighted) {
      vf lanes[4] = {};
      for (int s = 0; s < h.s; s++) {
        float c[4] = {};
        for (int k = 0; k < some; k++) c[k] = h.c[(int64_t)(j0 + k) * h.s + s];
        add_segment(h, h.tables + (int64_t)s * (h.l + 1), j0, c, lanes);
      }
      for (int k = 0; k < 4; k++) total[k] = sum_lanes(lanes[k]);
    } else {
      for (int k = 0; k < some; k++) {
        vf sum{};
        for (int i = 0; i < h.lp; i += W) sum += load(h.e + (int64_t)(j0 + k) * h.lp + i);
        total[k] = sum_lanes(sum);
      }
    }
    for (int k = 0; k < some; k++) {
      if (!(total[k] >= kLeastSum)) return false;
      const float factor = h.share[j0 + k] / total[k];
      for (int s = 0; s < h.s; s++) h.c[(int64_t)(j0 + k) * h.s + s] *= factor;
    }
  }
  switch (h.j) {
    case 1: add_columns<1>(h, w); break;
    case 2: add_columns<2>(h, w); break;
    case 3: add_columns<3>(h, w); break;
    case 4: add_columns<4>(h, w); break;
    default: add_columns<0>(h, w);
  }
  return true;
}

bool list_weights(const ProbeHead& h, float* w) {
  for (int i = 0; i < h.lp; i++) w[i] = 0;
  for (int j = 0; j < h.j; j++) {
    exp_row(h.z + (int64_t)j * h.l, h.l, h.lp, h.e);
    vf sum{};
    if (h.size_weighted) {
      for (int s = 0; s < h.s; s++)
        for (int i = 0; i < h.l; i += W) sum += run_lengths(h.tables + (int64_t)s * (h.l + 1), i, h.l) * load(h.e + i);
    } else {
      for (int i = 0; i < h.lp; i += W) sum += load(h.e + i);
    }
    float total = sum_lanes(sum);
    if (!(total >= kLeastSum)) return false;
    for (int i = 0; i < h.lp; i += W) store(w + i, load(w + i) + load(h.e + i) * splat(h.share[j] / total));
  }
  return true;
}

#if W == 8
// Which lanes a mask of 8 bits names, ascending.
struct Hits {
  uint8_t lanes[256][8];
  constexpr Hits() : lanes() {
    for (int mask = 0; mask < 256; mask++)
      for (int lane = 0, found = 0; lane < 8; lane++)
        if (mask >> lane & 1) lanes[mask][found++] = (uint8_t)lane;
  }
};
constexpr Hits kHits;
#endif

int heavy_runs(const float* w, int n, float least, int32_t* out) {
  int32_t* const begin = out;
  const vf limit = splat(least);
#if W == 16 && !defined(SAAP_EMULATE_AVX512)
  vi numbers;
  for (int j = 0; j < W; j++) numbers[j] = j;
  for (int i = 0; i < n; i += W, numbers += W) {
    const __mmask16 hit = _mm512_cmp_ps_mask((__m512)load(w + i), (__m512)limit, _CMP_GE_OQ);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(hit, (__m512i)numbers));
    out += __builtin_popcount(hit);
  }
#elif W == 8
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int i = 0; i < n; i += W) {  // without a branch: which are is anybody's guess
    const int hit = _mm256_movemask_ps(_mm256_cmp_ps((__m256)load(w + i), (__m256)limit, _CMP_GE_OQ));
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kHits.lanes[hit]));
    _mm256_storeu_si256((__m256i*)out, _mm256_add_epi32(_mm256_permutevar8x32_epi32(lanes, order), _mm256_set1_epi32(i)));
    out += __builtin_popcount(hit);
  }
#else
  for (int i = 0; i < n; i += W) {
    const vi hit = load(w + i) >= limit;
    for (int j = 0; j < W; j++) {
      *out = i + j;
      out -= hit[j];
    }
  }
#endif
  return (int)(out - begin);
}
