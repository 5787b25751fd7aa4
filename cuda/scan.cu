// Attention of a few queries per sequence over listed rows of the arena: 16-bit storage, tensor cores.
//
// For every pair (sequence b, KV head h) and its j query vectors, one softmax over rows [0, sinks), rows[:counts] (or those of
// runs, each given by the row behind it and by the number of rows in it and in those before it), [sealed, length) and the tail
// entries, an entry being the mean of a run with logit scale <query, mean key> + ln(length of the run).
// dense: over rows [0, length) instead. causal: query i of q sees recent row r only if r < length - q + 1 + i (dense: the same
// of any row); everything else is seen by all. With SAAP_PAGED the list is the `counts` rows of a pool, whose last q - 1 - i
// entries query i does not see. Row and run numbers outside the arena are left out. out = 0 and lse = -inf
// where nothing is seen. Products are of 16-bit numbers, sums float32. Queries of another type than the storage, and the
// softmax weights of those, are split into two 16-bit numbers each, so that they keep their accuracy.
//
// Grid (blocks, passes of kVectors query vectors); block kThreads; shared memory as in scan_params.cuh. Lengths are read from
// device memory: any grid is right for any of them. Pointers and extents: ScanParams.
// Deterministic: the same bits for the same grid, in whatever order blocks and warps run.
#include "scan_body.cuh"

// Weights 2^(logit - reference) reach 2^kHeadroom: fp16 then holds weights 2^-28 of the largest without loss.
constexpr int kHeadroom = kStorage == kF16 ? 14 : 0;

class TensorCore {
  static constexpr bool kSplit = kQuery != kStorage;
  static constexpr int kParts = kSplit ? 2 : 1, kKeySteps = KeyShape::kChunks / 2, kValueSteps = ValueShape::kChunks / 2;
  static constexpr int kTokenSteps = kTile / 16;

  // Fragments, of lane 4 * row + column / 2: q and p have a query vector per row, s and o per column (with column + 1).
  u32 q_[kKeySteps][kGroups][kParts][2];
  float o_[kValueSteps][kGroups][4];
  float reference_[kGroups][2], sum_[kGroups][2], scale_[kGroups][2];
  int seen_[kGroups][2];  // entries of the list that the vector sees
  int row_, column_;

 public:
  SAAP_PRIM explicit TensorCore(char*) : row_(threadIdx.x % 32 / 4), column_(threadIdx.x % 4 * 2) {}

  SAAP_PRIM void begin(const ScanParams& p, const Place& at, int pass) {
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      const int vector = pass * kVectors + g * 8 + row_;
      const float unit = load_query(p, static_cast<i64>(at.pair) * p.vectors + vector, vector < p.vectors, g);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        // The query vector of this column is the one of the row that lanes 4 * (column + c) hold.
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
    weigh(s, bias, index, masked);
    add_values(stage + KeyShape::kTileBytes, s);
  }

  SAAP_PRIM void deposit(int g, int count, float* values, float2* masses) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float sum = sum_[g][c];
#pragma unroll
      for (int o = 4; o < 32; o *= 2) sum += __shfl_xor_sync(kAll, sum, o);
      if (column_ + c >= count) continue;
      if (row_ == 0) masses[column_ + c] = make_float2(reference_[g][c], sum);
      float* to = values + (column_ + c) * kStride + row_;
#pragma unroll
      for (int s = 0; s < kValueSteps; s++) to[s * 16] = o_[s][g][c], to[s * 16 + 8] = o_[s][g][2 + c];
    }
  }

 private:
  // Query vector `vector` as fragments of group g, zeros if !valid. Returns what their products are to be multiplied by.
  SAAP_PRIM float load_query(const ScanParams& p, i64 vector, bool valid, int g) {
    const i64 first = vector * kD;
    float up = 1.f, down = 1.f;
    if constexpr (kSplit) {
      // A power of two brings the largest element to [2^13, 2^14): both parts are then far from the ends of fp16.
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
        const int x = s * 16 + half * 8 + column_;
        const bool there = valid && s * 16 + half * 8 < kD;
        if constexpr (kSplit) {
          const float low = there ? up * load<kQuery>(p.queries, first + x) : 0.f;
          const float high = there ? up * load<kQuery>(p.queries, first + x + 1) : 0.f;
          split(low, high, q_[s][g][0][half], q_[s][g][1][half]);
        } else {
          q_[s][g][0][half] = there ? *reinterpret_cast<const u32*>(static_cast<const u16*>(p.queries) + first + x) : 0u;
        }
      }
    return down;
  }

  // Two numbers as the sum of two pairs of 16-bit ones.
  static SAAP_PRIM void split(float low, float high, u32& large, u32& small) {
    large = narrow2<kStorage>(low, high);
    low -= widen<kStorage>(static_cast<u16>(large)), high -= widen<kStorage>(static_cast<u16>(large >> 16));
    small = narrow2<kStorage>(low, high);
  }

  // s = keys times queries: tokens by vectors.
  SAAP_PRIM void score(const char* keys, float (&s)[kTokenSteps][kGroups][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kTokenSteps; m++) {
      // Odd steps add up on their own: half the latency.
      float odd[kGroups][4];
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[m][g][i] = odd[g][i] = 0.f;
#pragma unroll
      for (int x = 0; x < kKeySteps; x++) {
        u32 a[4];
        ldmatrix4(a, keys + KeyShape::offset(m * 16 + lane % 16, x * 2 + lane / 16));
#pragma unroll
        for (int g = 0; g < kGroups; g++)
#pragma unroll
          for (int part = 0; part < kParts; part++)
            mma_16816<kStorage>(x % 2 ? odd[g] : s[m][g], a, q_[x][g][part][0], q_[x][g][part][1]);
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[m][g][i] += odd[g][i];
    }
  }

  // From products to weights, in place; references, sums and value sums follow.
  SAAP_PRIM void weigh(float (&s)[kTokenSteps][kGroups][4], float bias, int index, bool masked) {
    float biases[kTokenSteps][2];
#pragma unroll
    for (int m = 0; m < kTokenSteps; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) biases[m][half] = __shfl_sync(kAll, bias, m * 16 + half * 8 + row_);
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
            x = x * scale_[g][c] + biases[m][half];
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
            sum += x;
          }
        sum_[g][c] = sum;
#pragma unroll
        for (int v = 0; v < kValueSteps; v++) o_[v][g][c] *= keep, o_[v][g][2 + c] *= keep;
      }
  }

  // o += values times weights: dims by vectors.
  SAAP_PRIM void add_values(const char* values, const float (&s)[kTokenSteps][kGroups][4]) {
    const int lane = threadIdx.x % 32;
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
            weights[g][0][half] = narrow2<kStorage>(x, y);
          }
#pragma unroll
          for (int part = 0; part < kParts; part++) weights[g][part][half] = movmatrix_trans(weights[g][part][half]);
        }
#pragma unroll
      for (int v = 0; v < kValueSteps; v++) {
        u32 a[4];
        ldmatrix4_trans(a, values + ValueShape::offset(m * 16 + lane % 8 + lane / 16 * 8, v * 2 + lane / 8 % 2));
#pragma unroll
        for (int g = 0; g < kGroups; g++)
#pragma unroll
          for (int part = 0; part < kParts; part++)
            mma_16816<kStorage>(o_[v][g], a, weights[g][part][0], weights[g][part][1]);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, SAAP_BLOCKS) saap_scan(const __grid_constant__ ScanParams p) {
  scan_tiles<TensorCore>(p);
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_scan() { return static_cast<int>(sizeof(ScanParams)); }
#endif
