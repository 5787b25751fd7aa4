// Attention over listed rows, for a chunk of G query columns at a time: see ScanItem in kernels.h.
//
// A block of 16 rows is scored, its softmax weights are formed and its values are added, then the next block follows. Meanwhile
// rows of later blocks are fetched, values while keys are multiplied and keys while values are: into the second cache, for in the
// first they would push out what is needed now. Not left to the processor even where rows lie side by side: with K and V read in
// turn, and pages of 16 rows, it foresees too little.
constexpr int kBlock = 16;
template <int G> constexpr int kKeysAhead = G < 4 ? 2 : 1;  // blocks by which keys are fetched ahead; with few columns one is short
constexpr float kLowest = -3.402823466e38f;  // the running maximum before anything was seen: finite, so that differences stay numbers

INLINE void prefetch(const char* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// s (kBlock, G): scores of the block's rows in log2 units.
template <class T, int D, int G>
INLINE void score_block(const ScanItem& it, const float* q, const int32_t* rows, int n, bool fetch, float* s) {
  constexpr int R = W / G;  // rows scored at once: R * G sums fill the lanes of one vector
  const int d = D ? D : it.d, dp = D ? D : it.dp, whole = D ? D : d / kStep * kStep;
  const T* k = (const T*)it.k;
  const char* v = (const char*)it.v;
  const int v_bytes = it.e * (int)sizeof(T);
  const int64_t v_step = it.v_row * (int64_t)sizeof(T);
  for (int t = 0; t < n; t += R) {
    vf sum[W] = {};
    const T* row[R];
    for (int i = 0; i < R; i++) row[i] = k + (int64_t)rows[t + i] * it.k_row;
    for (int j = 0; j < whole; j += kStep) {
      vf x[R], y[R];
      for (int i = 0; i < R; i++) load2(row[i] + j, x[i], y[i]);
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
      for (int i = 0; i < R; i++) {
        vf x, y;
        load2_tail(row[i] + whole, d - whole, x, y);
        for (int g = 0; g < G; g++) sum[i * G + g] += x * load(q + g * dp + whole) + y * load(q + g * dp + whole + W);
      }
    }
    for (int i = 0; fetch && i < R; i++) prefetch(v + (int64_t)rows[kBlock + t + i] * v_step, v_bytes);
    store(s + t * G, sums_of(sum));
  }
}

// acc (G, ep) += weights (n, G) times the block's values. The weights past n are zero, but their rows may not be read.
template <class T, int E, int G>
INLINE void add_values(const ScanItem& it, const float* w, const int32_t* rows, int n, bool fetch, float* acc) {
  constexpr int P = G > 4 ? 4 : G;                 // columns and
  constexpr int B = P == 1 ? 4 : P == 2 ? 4 : 2;   // vectors of the row held in registers at once
  const int e = E ? E : it.e, ep = E ? E : it.ep, whole = E ? E : e / kStep * kStep;
  const T* v = (const T*)it.v;
  const char* k = (const char*)it.k;
  const int k_bytes = it.d * (int)sizeof(T);
  const int64_t k_step = it.k_row * (int64_t)sizeof(T), v_row = it.v_row;
  auto columns = [&](auto width, int j, int g0) __attribute__((always_inline)) {
    constexpr int b_count = decltype(width)::value;
    // An even share of a later block's keys in each pass: all of them in the first would fill the queue of cache misses.
    for (int i = kBlock * j / ep; fetch && g0 == 0 && i < kBlock * (j + b_count * W) / ep; i++)
      prefetch(k + (int64_t)rows[kKeysAhead<G> * kBlock + i] * k_step, k_bytes);
    vf a[P][b_count];
    for (int g = 0; g < P; g++)
      for (int b = 0; b < b_count; b++) a[g][b] = load(acc + (g0 + g) * ep + j + b * W);
    for (int i = 0; i < n; i++) {
      vf x[b_count];
      for (int b = 0; b < b_count; b += 2) load2(v + (int64_t)rows[i] * v_row + j + b * W, x[b], x[b + 1]);
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
  if (E == 0 && whole < e) {
    for (int i = 0; i < n; i++) {
      vf x, y;
      load2_tail(v + (int64_t)rows[i] * v_row + whole, e - whole, x, y);
      for (int g = 0; g < G; g++) {
        vf p = splat(w[i * G + g]);
        float* a = acc + g * ep + whole;
        store(a, load(a) + p * x);
        store(a + W, load(a + W) + p * y);
      }
    }
  }
}

// Turns scores into weights and brings maximum, sum and accumulators of the chunk up to date.
template <int G>
INLINE void weigh_block(int n, int ep, float* s, float* acc, float* m_mem, float* l_mem) {
  const int vectors = (n * G + W - 1) / W;
  vf m = load(m_mem), l = load(l_mem), top = splat(kLowest);
  for (int i = 0; i < vectors; i++) top = maximum(top, load(s + i * W));
  top = maximum(m, max_modulo<G>(top));
  vi grew = top > m;
  int any = 0;
  for (int i = 0; i < G; i++) any |= grew[i];
  if (any) {
    vf shrink = exp2_nonpositive(m - top);
    l *= shrink;
    for (int g = 0; g < G; g++) {
      vf c = splat(shrink[g]);
      for (int j = 0; j < ep; j += W) store(acc + g * ep + j, load(acc + g * ep + j) * c);
    }
    store(m_mem, top);
  }
  for (int i = 0; i < vectors; i++) {
    vf p = exp2_nonpositive(load(s + i * W) - top);
    store(s + i * W, p);
    l += p;
  }
  store(l_mem, l);
}

// Scores of rows that do not exist or that a column may not see become -inf, whose weight is exactly zero.
template <int G>
INLINE void hide_scores(const int32_t* limits, const int32_t* places, int n, float* s) {
  const int padded = (n * G + W - 1) / W * W;
  for (int i = n * G; i < padded; i++) s[i] = -INFINITY;
  if (!limits) return;
  for (int t = 0; t < n; t++)
    for (int g = 0; g < G; g++)
      if (places[t] >= limits[g]) s[t * G + g] = -INFINITY;
}

template <int G>
INLINE void add_bias(const float* bias, int n, float* s) {
  for (int t = 0; t < n; t++)
    for (int g = 0; g < G; g++) s[t * G + g] += bias[t];
}

// The loop over blocks of rows. Rows says where a row lies and how its scores and values are formed; codes.inl.h has others.
template <class Rows, int D, int G>
void scan_item(const ScanItem& it) {
  const int columns = it.chunks * G;
  alignas(64) float s[kBlock * G], m[kScanColumns * W], l[kScanColumns * W];
  const int dp = D ? D : it.dp, ep = D ? D : it.ep;
  std::memset(it.o, 0, sizeof(float) * columns * ep);
  for (int i = 0; i < it.chunks; i++) {
    store(m + i * W, splat(kLowest));  // lane i belongs to column i % G
    store(l + i * W, vf{});
  }
  for (int i = 0; i < kKeysAhead<G> * kBlock; i++) {
    prefetch(Rows::key(it, it.rows[i]), Rows::key_bytes(it));
    if (i < kBlock) prefetch(Rows::value(it, it.rows[i]), Rows::value_bytes(it));
  }
  for (int t = 0; t < it.n; t += kBlock) {
    const int n = it.n - t < kBlock ? it.n - t : kBlock;
    const int32_t* rows = it.rows + t;
    bool limited = false;
    if (it.limits)
      for (int i = 0; i < n; i++) limited |= it.places[t + i] >= it.limits_from;
    for (int c = 0; c < it.chunks; c++) {
      float* acc = it.o + c * G * ep;
      Rows::template score<D, G>(it, it.q + c * G * dp, rows, n, c == 0, s);
      if (it.bias) add_bias<G>(it.bias + t, n, s);
      if (limited || n * G % W) hide_scores<G>(limited ? it.limits + c * G : nullptr, it.places + t, n, s);
      weigh_block<G>(n, ep, s, acc, m + c * W, l + c * W);
      Rows::template add<D, G>(it, s, rows, n, c == 0, acc);
    }
  }
  for (int c = 0; c < it.chunks; c++) {
    vf sum = sum_modulo<G>(load(l + c * W));
    for (int g = 0; g < G; g++) {
      it.m[c * G + g] = m[c * W + g];
      it.l[c * G + g] = sum[g];
    }
  }
}

template <class T> struct NumberRows {
  INLINE const char* key(const ScanItem& it, int32_t row) { return (const char*)((const T*)it.k + (int64_t)row * it.k_row); }
  INLINE const char* value(const ScanItem& it, int32_t row) { return (const char*)((const T*)it.v + (int64_t)row * it.v_row); }
  INLINE int key_bytes(const ScanItem& it) { return it.d * (int)sizeof(T); }
  INLINE int value_bytes(const ScanItem& it) { return it.e * (int)sizeof(T); }
  template <int D, int G> INLINE void score(const ScanItem& it, const float* q, const int32_t* rows, int n, bool fetch, float* s) {
    score_block<T, D, G>(it, q, rows, n, fetch, s);
  }
  template <int D, int G> INLINE void add(const ScanItem& it, float* w, const int32_t* rows, int n, bool fetch, float* acc) {
    add_values<T, D, G>(it, w, rows, n, fetch, acc);
  }
};

template <class Rows, int D> void scan_group(const ScanItem& it) {
  switch (it.group) {
    case 1: return scan_item<Rows, D, 1>(it);
    case 2: return scan_item<Rows, D, 2>(it);
    case 4: return scan_item<Rows, D, 4>(it);
#if W >= 8
    case 8: return scan_item<Rows, D, 8>(it);
#endif
#if W >= 16
    case 16: return scan_item<Rows, D, 16>(it);
#endif
  }
}

template <class T, int D, int G>
void score_item(const ScanItem& it, float* s) {
  const int dp = D ? D : it.dp, padded = (it.n + kBlock - 1) / kBlock * kBlock;
  for (int t = 0; t < it.n; t += kBlock) {
    const int n = it.n - t < kBlock ? it.n - t : kBlock;
    for (int i = 0; i < kBlock; i++) prefetch((const char*)((const T*)it.k + (int64_t)it.rows[kBlock + t + i] * it.k_row), it.d * (int)sizeof(T));
    for (int c = 0; c < it.chunks; c++) score_block<T, D, G>(it, it.q + c * G * dp, it.rows + t, n, false, s + (c * padded + t) * G);
  }
}

template <class T, int D> void score_group(const ScanItem& it, float* s) {
  switch (it.group) {
    case 1: return score_item<T, D, 1>(it, s);
    case 2: return score_item<T, D, 2>(it, s);
    case 4: return score_item<T, D, 4>(it, s);
#if W >= 8
    case 8: return score_item<T, D, 8>(it, s);
#endif
#if W >= 16
    case 16: return score_item<T, D, 16>(it, s);
#endif
  }
}

void scores(DType t, const ScanItem& it, float* s) {
  with_type(t, [&](auto x) { score_group<decltype(x), 0>(it, s); });
}

// Head dims of 64, and of 128 in 16 bits, are worth code of their own.
template <class T> void scan_dims(const ScanItem& it) {
#if W >= 8
  if (it.d == 64 && it.e == 64) return scan_group<NumberRows<T>, 64>(it);
  if constexpr (sizeof(T) == 2) {
    if (it.d == 128 && it.e == 128) return scan_group<NumberRows<T>, 128>(it);
  }
#endif
  scan_group<NumberRows<T>, 0>(it);
}

void scan(DType t, const ScanItem& it) {
  with_type(t, [&](auto x) { scan_dims<decltype(x)>(it); });
}

template <class T> void pack_row(const float* row, int d, int dp, float scale, float* out) {
  for (int j = 0; j < dp; j += kStep) {
    float block[kStep] = {};
    const int n = d - j < kStep ? d - j : kStep;
    for (int i = 0; i < n; i++) block[i] = row[j + i] * scale;
    for (int i = 0; i < kStep; i++) out[j + place<T>(i)] = block[i];
  }
}

void pack_queries(DType t, const float* row, int d, int dp, float scale, float* out) {
  with_type(t, [&](auto x) { pack_row<decltype(x)>(row, d, dp, scale, out); });
}

template <class T> void unpack_row(const float* packed, int e, float* row) {
  for (int j = 0; j < e; j++) row[j] = packed[j / kStep * kStep + place<T>(j % kStep)];
}

void unpack_values(DType t, const float* packed, int e, float* row) {
  with_type(t, [&](auto x) { unpack_row<decltype(x)>(packed, e, row); });
}
