// The pass over the list numbers of a page: which of its tokens lie in a chosen list. See Kernels::find_lists.
//
// A number is looked up in 256 bits: its upper three bits choose one of eight words, which lie in one vector, its lower five the
// bit. The numbers of the tokens found are written side by side.
int find_lists(const uint8_t* lists, int n, const uint32_t* chosen, int32_t first, int32_t step, int32_t* out) {
  int32_t* const begin = out;
  int i = 0;
#if W >= 8
  typedef uint8_t bytes __attribute__((vector_size(W)));
  const auto numbers_of = [&](int at) __attribute__((always_inline)) {
    bytes x;
    std::memcpy(&x, lists + at, sizeof x);
    return __builtin_convertvector(x, vu);
  };
  vu words;
  for (int j = 0; j < W; j += 8) std::memcpy((uint32_t*)&words + j, chosen, 32);
#if W == 16 && !defined(SAAP_EMULATE_AVX512)
  vi numbers;
  for (int j = 0; j < W; j++) numbers[j] = first + j * step;
  for (; i + W <= n; i += W, numbers += W * step) {
    const vu x = numbers_of(i);
    const vu word = (vu)_mm512_maskz_permutexvar_epi32((__mmask16)-1, (__m512i)(x >> 5), (__m512i)words);
    const __mmask16 hit = _mm512_test_epi32_mask((__m512i)(word >> (x & 31)), (__m512i)(vu{} + 1));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(hit, (__m512i)numbers));
    out += __builtin_popcount(hit);
  }
#elif W == 8
  for (; i + W <= n; i += W) {
    const vu x = numbers_of(i);
    const vu word = (vu)_mm256_permutevar8x32_epi32((__m256i)words, (__m256i)(x >> 5));
    const vu sign = word << (31 - (x & 31));  // the bit as the sign
    for (int hit = _mm256_movemask_ps((__m256)sign); hit; hit &= hit - 1) *out++ = first + (i + __builtin_ctz(hit)) * step;
  }
#endif
#endif
  for (; i < n; i++) {  // without a branch: what is chosen is anybody's guess
    *out = first + i * step;
    out += chosen[lists[i] >> 5] >> (lists[i] & 31) & 1;
  }
  return (int)(out - begin);
}
