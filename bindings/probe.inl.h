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

// total (4) += sum over the runs of one segment of length * e, for columns j to j + 4 (those past the last repeat it).
INLINE void add_segment(const ProbeHead& h, const int32_t* table, int j, float* total) {
  const float* e[4];
  for (int k = 0; k < 4; k++) e[k] = h.e + (int64_t)(j + k < h.j ? j + k : h.j - 1) * h.lp;
  vf sum[4] = {};
  for (int i = 0; i < h.l; i += W) {
    vf n = run_lengths(table, i, h.l);
    for (int k = 0; k < 4; k++) sum[k] += n * load(e[k] + i);
  }
  for (int k = 0; k < 4; k++) total[k] += sum_lanes(sum[k]);
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
      for (int s = 0; s < h.s; s++) {
        float part[4] = {};
        add_segment(h, h.tables + (int64_t)s * (h.l + 1), j0, part);
        for (int k = 0; k < some; k++) total[k] += part[k] * h.c[(int64_t)(j0 + k) * h.s + s];
      }
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
  for (int s = 0; s < h.s; s++) {
    const int32_t* table = h.tables + (int64_t)s * (h.l + 1);
    float* out = w + (int64_t)s * h.lp;
    for (int i = 0; i < h.lp; i += W) {
      vf sum{};
      for (int j = 0; j < h.j; j++) sum += load(h.e + (int64_t)j * h.lp + i) * splat(h.c[(int64_t)j * h.s + s]);
      store(out + i, run_lengths(table, i, h.l) > vf{} ? sum : vf{});
    }
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
  for (int i = 0; i < n; i += W)
    for (int hit = _mm256_movemask_ps(_mm256_cmp_ps((__m256)load(w + i), (__m256)limit, _CMP_GE_OQ)); hit; hit &= hit - 1)
      *out++ = i + __builtin_ctz(hit);
#else
  for (int i = 0; i < n; i += W) {
    const vi hit = load(w + i) >= limit;
    for (int j = 0; j < W; j++) {  // without a branch: which are is anybody's guess
      *out = i + j;
      out -= hit[j];
    }
  }
#endif
  return (int)(out - begin);
}
