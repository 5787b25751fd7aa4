// Products of a few rows with panels of kPanel columns: the matrix work of `assign` and `route`. See PanelProduct in kernels.h.
constexpr int kVectors = kPanel / W;                // vectors per panel row
constexpr int kRows = W == 16 ? 12 : W == 8 ? 6 : (kWideFile ? 6 : 2);  // rows whose sums fit the register file
static_assert(kPanel % W == 0);

// One row of a panel.
INLINE void load_row(const float* row, vf (&b)[kVectors]) {
  for (int v = 0; v < kVectors; v++) b[v] = load(row + v * W);
}
INLINE void load_row(const uint32_t* row, vf (&b)[kVectors]) {
#if W == 16  // both halves of the vector are the same words
  constexpr vu kShift = {16, 16, 16, 16, 16, 16, 16, 16};
  vu words;
  std::memcpy(&words, row, 32);
  std::memcpy((char*)&words + 32, row, 32);
  b[0] = (vf)(words << kShift & 0xffff0000u);
#else
  for (int v = 0; v < kVectors / 2; v++) {
    vu words;
    std::memcpy(&words, row + v * W, sizeof words);
    b[v] = (vf)(words << 16);
    b[v + kVectors / 2] = (vf)(words & 0xffff0000u);
  }
#endif
}

INLINE void load_row(const int8_t* row, vf (&b)[kVectors]) {
  typedef int8_t bytes __attribute__((vector_size(W)));
  for (int v = 0; v < kVectors; v++) {
    bytes x;
    std::memcpy(&x, row + v * W, sizeof x);
    b[v] = __builtin_convertvector(x, vf);
  }
}

// sum (M, kVectors) = bias + x panel, for M consecutive rows of x; a panel's row takes `step` elements.
template <int M, class T>
INLINE void product(const float* x, int64_t ldx, int k, const T* panel, int step, const float* bias, vf (&sum)[M][kVectors]) {
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kVectors; v++) sum[m][v] = load(bias + v * W);
  for (int i = 0; i < k; i++) {
    vf b[kVectors];
    load_row(panel + (int64_t)i * step, b);
    for (int m = 0; m < M; m++) {
      vf a = splat(x[m * ldx + i]);
      for (int v = 0; v < kVectors; v++) sum[m][v] += a * b[v];
    }
  }
}

// The best column so far of each row, lane by lane: lane i of panel p is column p * kPanel + i.
struct Best {
  float value[kRows][kPanel];
  int32_t panel[kRows][kPanel];
};

// Of M rows from `row` on, which are rows `at` and on of the tile.
template <int M>
INLINE void update_best(const PanelProduct& p, int row, int panel, Best& best, int at = 0) {
  vf sum[M][kVectors];
  product<M>(p.x + row * p.ldx, p.ldx, p.k, p.wide_at(panel), kPanel, p.bias + (int64_t)panel * kPanel, sum);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kVectors; v++) {
      float* value = best.value[at + m] + v * W;
      int32_t* number = best.panel[at + m] + v * W;
      vf old = load(value);
      vi which = load(number), better = sum[m][v] > old;  // strict: the earlier panel keeps a tie
      store(value, better ? sum[m][v] : old);
      which = better ? splat(panel) : which;
      std::memcpy(number, &which, sizeof which);
    }
}

void nearest(const PanelProduct& p, int32_t* best_columns) {
  constexpr int kMost = 96;
  static_assert(kMost % kRows == 0);
  alignas(64) static thread_local Best best[kMost / kRows];
  for (int start = 0; start < p.n; start += kMost) {
    const int n = p.n - start < kMost ? p.n - start : kMost;
    const int tiles = (n + kRows - 1) / kRows;
    for (int t = 0; t < tiles; t++) {
      std::memset(best[t].panel, 0, sizeof best[t].panel);
      for (int m = 0; m < kRows; m++)
        for (int v = 0; v < kPanel; v += W) store(best[t].value[m] + v, splat(-INFINITY));
    }
    for (int panel = 0; panel < p.num_panels; panel++)
      for (int t = 0; t < tiles; t++) {
        const int row = start + t * kRows;
        if (row + kRows <= p.n) update_best<kRows>(p, row, panel, best[t]);
        else {  // each step reads the panel once
          int i = row;
          for (; i + 4 <= p.n && kRows > 4; i += 4) update_best<4>(p, i, panel, best[t], i - row);
          for (; i + 2 <= p.n; i += 2) update_best<2>(p, i, panel, best[t], i - row);
          if (i < p.n) update_best<1>(p, i, panel, best[t], i - row);
        }
      }
    for (int i = 0; i < n; i++) {
      const float* value = best[i / kRows].value[i % kRows];
      const int32_t* panel = best[i / kRows].panel[i % kRows];
      int32_t column = panel[0] * kPanel;
      float top = value[0];
      for (int lane = 1; lane < kPanel; lane++) {
        int32_t c = panel[lane] * kPanel + lane;
        if (value[lane] > top || (value[lane] == top && c < column)) {
          top = value[lane];
          column = c;
        }
      }
      best_columns[start + i] = column;
    }
  }
}

INLINE vf silu_of(vf x) {
  // x / (1 + e^-x), by the exponential of -|x|, which cannot overflow.
  vf size = x < vf{} ? -x : x;
  vf t = exp2_nonpositive(size * splat(-1.44269504f));
  return x * (x < vf{} ? t : splat(1.f)) / (splat(1.f) + t);
}

template <int M>
INLINE void dense_rows(const PanelProduct& p, int row, bool silu, float* y, int64_t ldy, int cols) {
  for (int panel = 0; panel < p.num_panels; panel++) {
    vf sum[M][kVectors];
    const float *x = p.x + row * p.ldx, *bias = p.bias + (int64_t)panel * kPanel;
    if (p.narrow) product<M>(x, p.ldx, p.k, p.narrow_at(panel), kPanel / 2, bias, sum);
    else if (p.bytes) product<M>(x, p.ldx, p.k, p.bytes_at(panel), kPanel, bias, sum);
    else product<M>(x, p.ldx, p.k, p.wide_at(panel), kPanel, bias, sum);
    const int n = cols - panel * kPanel;
    for (int m = 0; m < M; m++) {
      float* out = y + (row + m) * ldy + panel * kPanel;
      alignas(64) float block[kPanel];
      for (int v = 0; v < kVectors; v++) {
        vf r = silu ? silu_of(sum[m][v]) : sum[m][v];
        if (n >= kPanel) store(out + v * W, r);
        else store(block + v * W, r);
      }
      if (n < kPanel) std::memcpy(out, block, sizeof(float) * n);
    }
  }
}

void dense(const PanelProduct& p, bool silu, float* y, int64_t ldy, int cols) {
  int row = 0;  // each step reads the panels once: 3 and 5 are what groups of query heads often leave
  for (; row + 6 <= p.n && kRows >= 6; row += 6) dense_rows<6>(p, row, silu, y, ldy, cols);
  if (row + 5 == p.n && kRows >= 5) return dense_rows<5>(p, row, silu, y, ldy, cols);
  for (; row + 4 <= p.n && kRows >= 4; row += 4) dense_rows<4>(p, row, silu, y, ldy, cols);
  if (row + 3 == p.n && kRows >= 3) return dense_rows<3>(p, row, silu, y, ldy, cols);
  for (; row + 2 <= p.n; row += 2) dense_rows<2>(p, row, silu, y, ldy, cols);
  for (; row < p.n; row++) dense_rows<1>(p, row, silu, y, ldy, cols);
}

// load2 with elements where they lie in memory.
template <class T> INLINE void load2_in_order(const T* p, vf& x, vf& y) {
  if constexpr (!kEvenOdd<T>) {
    load2(p, x, y);
  } else {
#if W == 8
    if constexpr (std::is_same_v<T, bf16>) {
      x = (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
      y = (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + W))), 16);
      return;
    }
#elif W == 16 && !defined(SAAP_EMULATE_AVX512)
    if constexpr (std::is_same_v<T, bf16>) {
      x = (vf)_mm512_maskz_slli_epi32((__mmask16)-1, _mm512_maskz_cvtepu16_epi32((__mmask16)-1, _mm256_loadu_si256((const __m256i*)p)), 16);
      y = (vf)_mm512_maskz_slli_epi32((__mmask16)-1, _mm512_maskz_cvtepu16_epi32((__mmask16)-1, _mm256_loadu_si256((const __m256i*)(p + W))), 16);
      return;
    }
#endif
    vf even, odd;
    load2(p, even, odd);
    for (int i = 0; i < W / 2; i++) x[2 * i] = even[i], x[2 * i + 1] = odd[i];
    for (int i = 0; i < W / 2; i++) y[2 * i] = even[W / 2 + i], y[2 * i + 1] = odd[W / 2 + i];
  }
}

template <class T>
void load_row_of(const T* src, int d, const float* cos, const float* sin, int r, bool interleaved, float scale, float* dst) {
  int j = 0;
  for (; j + kStep <= d; j += kStep) {
    vf x, y;
    load2_in_order(src + j, x, y);
    store(dst + j, x);
    store(dst + j + W, y);
  }
  for (; j < d; j++) dst[j] = saap::to_float(src[j]);
  const int half = r / 2;
  if (interleaved) {
    for (int i = 0; i < half; i++) {
      float x = dst[2 * i], y = dst[2 * i + 1];
      dst[2 * i] = (x * cos[i] + y * sin[i]) * scale;
      dst[2 * i + 1] = (y * cos[i] - x * sin[i]) * scale;
    }
  } else {
    int i = 0;
    for (; i + W <= half; i += W) {
      vf x = load(dst + i), y = load(dst + half + i), c = load(cos + i) * splat(scale), s = load(sin + i) * splat(scale);
      store(dst + i, x * c + y * s);
      store(dst + half + i, y * c - x * s);
    }
    for (; i < half; i++) {
      float x = dst[i], y = dst[half + i];
      dst[i] = (x * cos[i] + y * sin[i]) * scale;
      dst[half + i] = (y * cos[i] - x * sin[i]) * scale;
    }
  }
}

void load_row(DType t, const void* src, int d, const float* cos, const float* sin, int r, bool interleaved, float scale, float* dst) {
  with_type(t, [&](auto x) { load_row_of((const decltype(x)*)src, d, cos, sin, r, interleaved, scale, dst); });
}
