// The scan of scan.cu over rows that are codes, as they lie: 8-bit keys, values of SAAP_CODED bits, tensor cores.
//
// For every pair (sequence, KV head) one softmax over the listed rows, all of them codes, and over the coded rows [x, w), which are
// sinks, and [z, y), which are recent, or all, where attention is dense: spans[b] is (x, y, z, w). causal: the recent ones as scan.cu
// says, meta[b].length + y - x being the length of the sequence. Sinks and recent tokens that are numbers, and means, are another
// scan's. SAAP_T is fp16, whatever the other tokens are stored as; keys (b, h, N, d + 4), values (b, h, N, e * bits / 8 + 4) are
// bytes, 4-byte aligned; rows and runs number them; spans as in ScanParams; tail and dense are null. out : float32 (b, h, j, e),
// rotated as 4-bit values are.
//
// Products are of whole numbers, which fp16 holds, and of queries and weights: those of float32 are split into two fp16 each, weights
// unless queries are fp16; queries of bfloat16 are fp16 times a power of two. The scale of a key multiplies its product, that of a value its weight.
//
// Grid, block, shared memory, determinism: scan.cu. Stages hold codes as in device memory (scan_params.cuh).
#include "scan_body.cuh"
#include "codes.cuh"

constexpr int kHeadroom = 14;  // as in scan.cu

class CodedCore {
  static constexpr bool kSplit = kQuery != kF16;
  // A number of bfloat16 with its exponent brought into the range of fp16 is one: only float32 has more bits.
  static constexpr int kQueryParts = kQuery == kF32 ? 2 : 1, kParts = kSplit ? 2 : 1, kKeySteps = (kD + 15) / 16, kTokenSteps = kTile / 16;
  static constexpr int kPayload = kValueWords - 1, kLaneWords = (kPayload + 7) / 8;  // words of a value; those of a lane
  static constexpr int kHalves = SAAP_CODED == 8 ? 1 : 2, kPairs = kHalves * 2;      // steps of a word: two numbers each
  static constexpr int kValueSteps = kLaneWords * kPairs;

  // Fragments, of lane 4 * row + column / 2. Which dims a step of a fragment has is free: of keys and queries each lane has four
  // neighbours, of values the numbers of its words.
  u32 q_[kKeySteps][kGroups][kQueryParts][2];
  float o_[kValueSteps][kGroups][4];
  float reference_[kGroups][2], sum_[kGroups][2], scale_[kGroups][2];
  int seen_[kGroups][2];
  int row_, column_;

 public:
  SAAP_PRIM explicit CodedCore(char*) : row_(threadIdx.x % 32 / 4), column_(threadIdx.x % 4 * 2) {}

  SAAP_PRIM void begin(const ScanParams& p, const Place& at, int pass) {
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      const int vector = pass * kVectors + g * 8 + row_;
      const float unit = load_query(p, static_cast<i64>(at.pair) * p.vectors + vector, vector < p.vectors, g);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        scale_[g][c] = p.scale_log2 * (kSplit ? __shfl_sync(kAll, unit, 4 * (column_ + c)) : 1.f);
        seen_[g][c] = seen_entries(p, at.span, pass * kVectors + g * 8 + column_ + c);
        reference_[g][c] = -INFINITY, sum_[g][c] = 0.f;
      }
#pragma unroll
      for (int s = 0; s < kValueSteps; s++)
#pragma unroll
        for (int i = 0; i < 4; i++) o_[s][g][i] = 0.f;
    }
  }

  SAAP_PRIM void tile(const char* stage, float bias, int index, bool masked) {
    float s[kTokenSteps][kGroups][4];
    score(stage, s);
    weigh(stage, s, bias, index, masked);
    add_values(stage + kTile * kKeyStride, s);
  }

  SAAP_PRIM void deposit(int g, int count, float* values, float2* masses) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float sum = sum_[g][c];
#pragma unroll
      for (int o = 4; o < 32; o *= 2) sum += __shfl_xor_sync(kAll, sum, o);
      if (column_ + c >= count) continue;
      if (row_ == 0) masses[column_ + c] = make_float2(reference_[g][c], sum);
      float* to = values + (column_ + c) * kStride;
#pragma unroll
      for (int s = 0; s < kValueSteps; s++) {
        const int word = s / kPairs * 8 + row_, k = s % kPairs * 2;
        if (word >= kPayload) continue;
        to[dim_of<SAAP_CODED, kE>(word, k)] = o_[s][g][c], to[dim_of<SAAP_CODED, kE>(word, k + 1)] = o_[s][g][2 + c];
      }
    }
  }

 private:
  // As in scan.cu, of the dims that `score` has in each step.
  SAAP_PRIM float load_query(const ScanParams& p, i64 vector, bool valid, int g) {
    const i64 first = vector * kD;
    float up = 1.f, down = 1.f;
    if constexpr (kSplit) {
      float largest = 0.f;
#pragma unroll
      for (int x = 0; x < kD; x += 8) {
        const float low = valid ? load<kQuery>(p.queries, first + x + column_) : 0.f;
        const float high = valid ? load<kQuery>(p.queries, first + x + column_ + 1) : 0.f;
        largest = fmaxf(largest, fmaxf(fabsf(low), fabsf(high)));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 2));
      const int exponent = clamp(267 - static_cast<int>(__float_as_uint(largest) >> 23), 1, 253);
      up = __uint_as_float(static_cast<u32>(exponent) << 23), down = __uint_as_float(static_cast<u32>(254 - exponent) << 23);
    }
#pragma unroll
    for (int s = 0; s < kKeySteps; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int x = s * 16 + column_ * 2 + half * 2;
        const bool there = valid && x < kD;
        if constexpr (kSplit) {
          const float low = there ? up * load<kQuery>(p.queries, first + x) : 0.f;
          const float high = there ? up * load<kQuery>(p.queries, first + x + 1) : 0.f;
          if constexpr (kQueryParts == 2) split(low, high, q_[s][g][0][half], q_[s][g][1][half]);
          else q_[s][g][0][half] = narrow2<kF16>(low, high);
        } else {
          q_[s][g][0][half] = there ? *reinterpret_cast<const u32*>(static_cast<const u16*>(p.queries) + first + x) : 0u;
        }
      }
    return down;
  }

  static SAAP_PRIM void split(float low, float high, u32& large, u32& small) {
    large = narrow2<kF16>(low, high);
    low -= widen<kF16>(static_cast<u16>(large)), high -= widen<kF16>(static_cast<u16>(large >> 16));
    small = narrow2<kF16>(low, high);
  }

  // The word of a row of codes in shared memory; past the payload a word of anything.
  static SAAP_PRIM u32 word_at(const char* row, int word, int payload) {
    return *reinterpret_cast<const u32*>(row + (word < payload ? word : 0) * 4);
  }

  // s = keys times queries: tokens by vectors.
  SAAP_PRIM void score(const char* keys, float (&s)[kTokenSteps][kGroups][4]) {
#pragma unroll
    for (int m = 0; m < kTokenSteps; m++) {
      float odd[kGroups][4];
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[m][g][i] = odd[g][i] = 0.f;
      const char* row = keys + (m * 16 + row_) * kKeyStride;
#pragma unroll
      for (int x = 0; x < kKeySteps; x++) {
        const int word = x * 4 + column_ / 2;
        const u32 upper = numbers<8>(word_at(row, word, kKeyWords - 1), 0);
        const u32 lower = numbers<8>(word_at(row + 8 * kKeyStride, word, kKeyWords - 1), 0);
        const u32 a[4] = {halves(upper, 0), halves(lower, 0), halves(upper, 1), halves(lower, 1)};
#pragma unroll
        for (int g = 0; g < kGroups; g++)
#pragma unroll
          for (int part = 0; part < kQueryParts; part++)
            mma_16816<kF16>(x % 2 ? odd[g] : s[m][g], a, q_[x][g][part][0], q_[x][g][part][1]);
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[m][g][i] += odd[g][i];
    }
  }

  // From products to weights times the scales of values, in place. Logits count those in: of a scale 2^n * x, 1 <= x < 2, n is added
  // before the reference is chosen, so that what fp16 holds are weights of the values as they are.
  SAAP_PRIM void weigh(const char* stage, float (&s)[kTokenSteps][kGroups][4], float bias, int index, bool masked) {
    const char* values = stage + kTile * kKeyStride;
    float biases[kTokenSteps][2], key_scales[kTokenSteps][2], powers[kTokenSteps][2], inverses[kTokenSteps][2], rests[kTokenSteps][2];
#pragma unroll
    for (int m = 0; m < kTokenSteps; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int token = m * 16 + half * 8 + row_;
        biases[m][half] = __shfl_sync(kAll, bias, token);
        key_scales[m][half] = *reinterpret_cast<const float*>(stage + token * kKeyStride + (kKeyWords - 1) * 4);
        const float scale = *reinterpret_cast<const float*>(values + token * kValueStride + kPayload * 4);
        const int exponent = clamp(static_cast<int>(__float_as_uint(scale) >> 23), 27, 253);
        powers[m][half] = static_cast<float>(exponent - 127);
        inverses[m][half] = __uint_as_float(static_cast<u32>(254 - exponent) << 23);
        rests[m][half] = scale * inverses[m][half];
      }
#pragma unroll
    for (int g = 0; g < kGroups; g++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float top = -INFINITY;
#pragma unroll
        for (int m = 0; m < kTokenSteps; m++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float& x = s[m][g][2 * half + c];
            x = x * scale_[g][c] * key_scales[m][half] + biases[m][half] + powers[m][half];
            if (masked && index + m * 16 + half * 8 + row_ >= seen_[g][c]) x = -INFINITY;
            top = fmaxf(top, x);
          }
#pragma unroll
        for (int o = 4; o < 32; o *= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, o));
        const float before = reference_[g][c], reference = fmaxf(before, top - kHeadroom);
        const float base = reference == -INFINITY ? 0.f : reference, keep = exp2_fast(before - base);
        reference_[g][c] = reference;
        float sum = sum_[g][c] * keep;
#pragma unroll
        for (int m = 0; m < kTokenSteps; m++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float& x = s[m][g][2 * half + c];
            x = exp2_fast(x - base);
            sum += x * inverses[m][half];
            x *= rests[m][half];
          }
        sum_[g][c] = sum;
#pragma unroll
        for (int v = 0; v < kValueSteps; v++) o_[v][g][c] *= keep, o_[v][g][2 + c] *= keep;
      }
  }

  // o += values times weights: dims by vectors.
  SAAP_PRIM void add_values(const char* values, const float (&s)[kTokenSteps][kGroups][4]) {
#pragma unroll
    for (int m = 0; m < kTokenSteps; m++) {
      u32 weights[kGroups][kParts][2];
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float x = s[m][g][2 * half], y = s[m][g][2 * half + 1];
          if constexpr (kSplit) {
            split(x, y, weights[g][0][half], weights[g][1][half]);
          } else {
            weights[g][0][half] = narrow2<kF16>(x, y);
          }
#pragma unroll
          for (int part = 0; part < kParts; part++) weights[g][part][half] = movmatrix_trans(weights[g][part][half]);
        }
      const char* rows = values + (m * 16 + column_) * kValueStride;
#pragma unroll
      for (int v = 0; v < kLaneWords; v++) {
        const int word = v * 8 + row_;
        u32 words[4];  // of tokens column, column + 1, column + 8, column + 9
#pragma unroll
        for (int t = 0; t < 4; t++) words[t] = word_at(rows + (t % 2 + t / 2 * 8) * kValueStride, word, kPayload);
#pragma unroll
        for (int half = 0; half < kHalves; half++) {
          u32 four[4];
#pragma unroll
          for (int t = 0; t < 4; t++) four[t] = numbers<SAAP_CODED>(words[t], half);
#pragma unroll
          for (int pair = 0; pair < 2; pair++) {
            // Numbers 2 * pair and the next: of tokens column and column + 1, then of the other two.
            const u32 near = __byte_perm(four[0], four[1], pair ? 0x7362 : 0x5140);
            const u32 far = __byte_perm(four[2], four[3], pair ? 0x7362 : 0x5140);
            const u32 a[4] = {halves(near, 0), halves(near, 1), halves(far, 0), halves(far, 1)};
            const int step = v * kPairs + half * 2 + pair;
#pragma unroll
            for (int g = 0; g < kGroups; g++)
#pragma unroll
              for (int part = 0; part < kParts; part++) mma_16816<kF16>(o_[step][g], a, weights[g][part][0], weights[g][part][1]);
          }
        }
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, SAAP_BLOCKS) saap_scan_codes(const __grid_constant__ ScanParams p) {
  scan_tiles<CodedCore>(p);
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_scan_codes() { return static_cast<int>(sizeof(ScanParams)); }
#endif
