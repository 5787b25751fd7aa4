// The mean key and the mean value of every run: what the tail estimate attends to in place of the rows.
#include "prims.cuh"

struct MeansParams {
  const int* jobs;                 // (z, 2): sequence and segment of each; or null: segments 0, 1, ... of the first sequence
  const char *keys, *values;       // (b, h, N, d), (b, h, N, e), rows contiguous, 16-byte aligned
  const int* tables;               // (b, h, s, l + 1), strides below: rows where runs start
  char *mean_keys, *mean_values;   // out (b, h, s, l, d), (b, h, s, l, e), strides below, rows 16-byte aligned; of `type`
  i64 key_sequence, key_head, value_sequence, value_head;                                  // bytes
  i64 table_sequence, table_head, table_segment;                                           // elements
  i64 mean_key_sequence, mean_key_head, mean_key_segment;                                  // bytes
  i64 mean_value_sequence, mean_value_head, mean_value_segment;                            // bytes
  int capacity;                    // N
  int key_vectors, value_vectors;  // row lengths in units of 16 bytes
  int type;                        // dtype of the arena
};

namespace {

constexpr int kWarp = 32, kWarps = 8;
constexpr int kAhead = 8;  // rows of a warp in flight

template <int T>
struct Lane {
  static constexpr int kElements = T == kF32 ? 4 : 8;
  // sums[i] += element i of a vector.
  static __device__ __forceinline__ void add(float (&sums)[kElements], uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kElements; i++)
      if constexpr (T == kF32) sums[i] += __uint_as_float(words[i]);
      else sums[i] += widen<T>(static_cast<u16>(words[i / 2] >> 16 * (i % 2)));
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[kElements]) {
    if constexpr (T == kF32)
      return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
    else
      return make_uint4(narrow2<T>(x[0], x[1]), narrow2<T>(x[2], x[3]), narrow2<T>(x[4], x[5]), narrow2<T>(x[6], x[7]));
  }
};

template <int T>
__device__ __forceinline__ void run_mean(const MeansParams& p, float* partial) {
  constexpr int kElements = Lane<T>::kElements;
  const int list = blockIdx.x, head = blockIdx.y;
  const int sequence = p.jobs ? p.jobs[2 * blockIdx.z] : 0, segment = p.jobs ? p.jobs[2 * blockIdx.z + 1] : blockIdx.z;
  const char *keys = p.keys + sequence * p.key_sequence, *values = p.values + sequence * p.value_sequence;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int* table = p.tables + sequence * p.table_sequence + head * p.table_head + segment * p.table_segment;
  const int first = min(max(table[list], 0), p.capacity), past = min(max(table[list + 1], first), p.capacity);
  const int vectors = p.key_vectors + p.value_vectors;

  for (int group = 0; group < vectors; group += kWarp) {
    const int v = group + lane;
    const bool is_key = v < p.key_vectors;
    const int row_bytes = (is_key ? p.key_vectors : p.value_vectors) * 16, at = (is_key ? v : v - p.key_vectors) * 16;
    float sums[kElements] = {};
    if (v < vectors) {
      const char* from = (is_key ? keys + head * p.key_head : values + head * p.value_head) + at;
      // Warp w takes rows 8 w to 8 w + 7 of every 64. Counting what is left cannot overflow, as a row number could.
      for (int left = past - first - warp * kAhead; left > 0; left -= kWarps * kAhead) {
        const char* row = from + static_cast<i64>(past - left) * row_bytes;
        uint4 data[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) data[i] = ld_stream16(row + min(i, left - 1) * row_bytes);  // beyond: read, not added
#pragma unroll
        for (int i = 0; i < kAhead; i++)
          if (i < left) Lane<T>::add(sums, data[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kElements; i++) partial[(warp * kElements + i) * kWarp + lane] = sums[i];
    __syncthreads();
    if (warp == 0 && v < vectors) {
      const float count = fmaxf(static_cast<float>(past - first), 1.f);
      float mean[kElements];
#pragma unroll
      for (int i = 0; i < kElements; i++) {
        float sum = partial[i * kWarp + lane];
#pragma unroll
        for (int w = 1; w < kWarps; w++) sum += partial[(w * kElements + i) * kWarp + lane];
        mean[i] = sum / count;
      }
      const i64 mean_key = sequence * p.mean_key_sequence + head * p.mean_key_head + segment * p.mean_key_segment;
      const i64 mean_value = sequence * p.mean_value_sequence + head * p.mean_value_head + segment * p.mean_value_segment;
      char* to = is_key ? p.mean_keys + mean_key : p.mean_values + mean_value;
      *reinterpret_cast<uint4*>(to + static_cast<i64>(list) * row_bytes + at) = Lane<T>::pack(mean);
    }
    __syncthreads();
  }
}

}  // namespace

// Means of every run of some segments; an empty run has mean 0.
//
// Grid (l, h, z), z segments: a block of 256 threads per run, its warps taking stretches of 8 rows in turn; shared memory 8 KiB.
// Sums in float32, in an order that depends on the length of the run alone: the same bits each time. Offsets are clamped to
// the arena.
extern "C" __global__ void __launch_bounds__(kWarp* kWarps) saap_means(const __grid_constant__ MeansParams p) {
  SAAP_SHARED(float, partial);  // (warp, element, lane)
  if (p.type == kBF16) run_mean<kBF16>(p, partial);
  else if (p.type == kF16) run_mean<kF16>(p, partial);
  else run_mean<kF32>(p, partial);
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_means() { return sizeof(MeansParams); }
#endif
