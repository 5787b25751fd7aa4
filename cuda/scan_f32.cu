// The kernel of scan.cu for float32 storage: plain multiplications, the slow path. Same parameters, same results.
//
// Grid (blocks, passes of 8 query vectors); SAAP_GROUPS 1, SAAP_TILE 16; the core's own shared memory holds the queries (8, kD)
// and weights (kWarps, 8, 16), floats. Everything else: scan.cu.
#include "scan_body.cuh"

static_assert(kStorage == kF32 && kGroups == 1 && kTile == 16, "the layout of this kernel's lanes");

// Of the logits lane i has those of token i % 16 for query vectors 4 * (i / 16) to + 3; of the values the chunks i, i + 32, ...
// for all eight.
class PlainCore {
  static constexpr int kColumns = (ValueShape::kChunks + 31) / 32;

  float4 o_[8][kColumns];
  float reference_[4], sum_[4];
  int seen_[4];
  float scale_;
  float *queries_, *weights_;

 public:
  SAAP_PRIM explicit PlainCore(char* own)
      : queries_(reinterpret_cast<float*>(own)), weights_(queries_ + 8 * kD + threadIdx.x / 32 * 128) {}

  SAAP_PRIM void begin(const ScanParams& p, const Place& at, int pass) {
    const int first = pass * 8, half = threadIdx.x % 32 / 16;
    for (int i = threadIdx.x; i < 8 * kD; i += kThreads) {
      const i64 vector = static_cast<i64>(at.pair) * p.vectors + first + i / kD;
      queries_[i] = first + i / kD < p.vectors ? load<kQuery>(p.queries, vector * kD + i % kD) : 0.f;
    }
    __syncthreads();
    scale_ = p.scale_log2;
#pragma unroll
    for (int u = 0; u < 4; u++) {
      seen_[u] = seen_entries(p, at.span, first + half * 4 + u);
      reference_[u] = -INFINITY, sum_[u] = 0.f;
    }
#pragma unroll
    for (int v = 0; v < 8; v++)
#pragma unroll
      for (int c = 0; c < kColumns; c++) o_[v][c] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  SAAP_PRIM void tile(const char* stage, float bias, int index, bool masked) {
    const int lane = threadIdx.x % 32, token = lane % 16, half = lane / 16;
    float s[4] = {0.f, 0.f, 0.f, 0.f};
    const float* query = queries_ + half * 4 * kD;
#pragma unroll 4
    for (int c = 0; c < KeyShape::kChunks; c++) {
      const float4 key = *reinterpret_cast<const float4*>(stage + KeyShape::offset(token, c));
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const float4 q = *reinterpret_cast<const float4*>(query + u * kD + c * 4);
        s[u] += key.x * q.x, s[u] += key.y * q.y, s[u] += key.z * q.z, s[u] += key.w * q.w;
      }
    }
    float keep[4];
#pragma unroll
    for (int u = 0; u < 4; u++) {
      float x = s[u] * scale_ + bias;
      if (masked && index + token >= seen_[u]) x = -INFINITY;
      float top = x;
#pragma unroll
      for (int o = 1; o < 16; o *= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, o));
      const float before = reference_[u], reference = fmaxf(before, top), base = reference == -INFINITY ? 0.f : reference;
      reference_[u] = reference;
      keep[u] = exp2_fast(before - base);
      x = exp2_fast(x - base);
      sum_[u] = sum_[u] * keep[u] + x;
      weights_[(half * 4 + u) * 16 + token] = x;
    }
    __syncwarp();
#pragma unroll
    for (int v = 0; v < 8; v++) {
      const float factor = __shfl_sync(kAll, keep[v % 4], v / 4 * 16);
#pragma unroll
      for (int c = 0; c < kColumns; c++) o_[v][c].x *= factor, o_[v][c].y *= factor, o_[v][c].z *= factor, o_[v][c].w *= factor;
    }
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      const int chunk = lane + 32 * c;
      if (chunk >= ValueShape::kChunks) break;
#pragma unroll 4
      for (int t = 0; t < 16; t++) {
        const float4 value = *reinterpret_cast<const float4*>(stage + KeyShape::kTileBytes + ValueShape::offset(t, chunk));
#pragma unroll
        for (int v = 0; v < 8; v++) {
          const float weight = weights_[v * 16 + t];
          o_[v][c].x += weight * value.x, o_[v][c].y += weight * value.y;
          o_[v][c].z += weight * value.z, o_[v][c].w += weight * value.w;
        }
      }
    }
  }

  SAAP_PRIM void deposit(int, int, float* values, float2* masses) {
    const int lane = threadIdx.x % 32, half = lane / 16;
#pragma unroll
    for (int u = 0; u < 4; u++) {
      float sum = sum_[u];
#pragma unroll
      for (int o = 1; o < 16; o *= 2) sum += __shfl_xor_sync(kAll, sum, o);
      if (lane % 16 == 0) masses[half * 4 + u] = make_float2(reference_[u], sum);
    }
#pragma unroll
    for (int v = 0; v < 8; v++)
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        const int chunk = lane + 32 * c;
        if (chunk < ValueShape::kChunks) *reinterpret_cast<float4*>(values + v * kStride + chunk * 4) = o_[v][c];
      }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, SAAP_BLOCKS) saap_scan_f32(const __grid_constant__ ScanParams p) {
  scan_tiles<PlainCore>(p);
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_scan_f32() { return static_cast<int>(sizeof(ScanParams)); }
#endif
