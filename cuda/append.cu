// Appending: new keys and values go behind the rows in use, for a token or for a prompt.
#include "prims.cuh"

#ifndef SAAP_STEP
#define SAAP_STEP 0  // 1: few tokens of a step, whose sequences keep their lengths in meta
#endif

struct AppendParams {
  const char *keys, *values;         // new tokens, (b, h, n, d) and (b, h, n, e), strides below
  char *arena_keys, *arena_values;   // (b, h, N, d), (b, h, N, e), contiguous, 16-byte aligned
  int* meta;                         // (b, 8), if SAAP_STEP, else null
  const int* starts;                 // (b), unless SAAP_STEP: first row of each sequence
  const int* counts;                 // (b), or null: all n tokens of each sequence
  int* flags;                        // (b), unless SAAP_STEP: error bits, set but never cleared
  int* tickets;                      // out (num_tickets): zeros, for the scan of the same step; null for none
  i64 key_b, key_h, key_n;           // strides in bytes
  i64 value_b, value_h, value_n;
  int n, capacity, heads;            // tokens in keys and values; N; h
  int key_vectors, value_vectors;    // row lengths in units of 16 bytes
  u32 high_exponent, low_exponent;   // see not_finite
  int aligned;                       // keys, values and all strides are multiples of 16 bytes
  int num_tickets;
  float inverse_vectors, inverse_n;  // 1 / vectors of a key and a value, 1 / n, rounded
};

namespace {

constexpr int kLength = 0, kNextPosition = 4, kErrors = 7, kMetaWords = 8;
constexpr int kNotFinite = 1, kFull = 2;
[[maybe_unused]] constexpr int kAhead = 4;  // vectors of a thread in flight

// Whether an element has an exponent of all ones. The masks mark the exponent of the element in the upper and in the lower half
// of a word; they are the same for 32-bit elements.
__device__ __forceinline__ bool not_finite(u32 word, u32 high, u32 low) { return (word & high) == high || (word & low) == low; }

__device__ __forceinline__ uint4 read_vector(const char* from, bool aligned) {
  if (aligned) return ld_stream16(from);
  const u16* x = reinterpret_cast<const u16*>(from);
  u32 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = static_cast<u32>(x[2 * i]) | static_cast<u32>(x[2 * i + 1]) << 16;
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// x / y of x < 2^22, given 1 / y, rounded: exact.
__device__ __forceinline__ u32 divided(u32 x, float inverse) {
  return static_cast<u32>((static_cast<float>(x) + 0.5f) * inverse);
}

}  // namespace

#if SAAP_STEP
// Puts counts[i] leading tokens (or all n) of sequence i to its rows from its length, and length and next_position grow by as many. A
// sequence with no room for them keeps its rows and its length, and gets error bit 1; one of whose tokens holds NaN or infinity gets
// bit 0, and the rows all the same. Tickets become zeros.
//
// Grid (1, 1, b): one block alone reads and writes the length of a sequence. Block: a multiple of 32, at most 1024.
// Precondition: h * n * (key_vectors + value_vectors) < 2^22. The caller's counts are clamped to [0, n].
// Deterministic. Rows may still be on their way when the length is written, so a reader of them starts after the kernel.
// It runs once a token, from code that is cold: so it is short, and asks for all it reads at once.
extern "C" __global__ void __launch_bounds__(1024) saap_append(const __grid_constant__ AppendParams p) {
  const int sequence = blockIdx.z;
  const u32 vectors = p.key_vectors + p.value_vectors, n = p.n, total = p.heads * n * vectors;
  int* const meta = p.meta + sequence * kMetaWords;
  grid_dependency_launch();  // at once: what follows waits for the end of this kernel, and so for the end of those in front of it
  grid_dependency_wait();
  const int start = meta[kLength], next = meta[kNextPosition];
  const int wanted = p.counts ? min(max(p.counts[sequence], 0), p.n) : p.n;
  bool bad = false, fits = false;
#pragma unroll 1
  for (u32 v = threadIdx.x; v < total; v += blockDim.x) {
    const u32 line = divided(v, p.inverse_vectors), head = divided(line, p.inverse_n), token = line - head * n;
    const u32 place = v - line * vectors, of_value = place - p.key_vectors;
    const bool key = place < static_cast<u32>(p.key_vectors);
    const char* from = key ? p.keys + sequence * p.key_b + head * p.key_h + token * p.key_n + place * 16
                           : p.values + sequence * p.value_b + head * p.value_h + token * p.value_n + of_value * 16;
    const uint4 x = read_vector(from, p.aligned);
    fits = start >= 0 && wanted <= p.capacity - start;
    if (!fits || token >= static_cast<u32>(wanted)) continue;
    const i64 row = (static_cast<i64>(sequence) * p.heads + head) * p.capacity + start + token;
    *reinterpret_cast<uint4*>(key ? p.arena_keys + (row * p.key_vectors + place) * 16
                                  : p.arena_values + (row * p.value_vectors + of_value) * 16) = x;
    bad |= not_finite(x.x, p.high_exponent, p.low_exponent) || not_finite(x.y, p.high_exponent, p.low_exponent) ||
           not_finite(x.z, p.high_exponent, p.low_exponent) || not_finite(x.w, p.high_exponent, p.low_exponent);
  }
  if (bad) atomicOr(meta + kErrors, kNotFinite);
  // A scan leaves zeros; what came of two at once, against the rules, ends here.
#pragma unroll 1
  for (int i = sequence * blockDim.x + threadIdx.x; i < p.num_tickets; i += gridDim.z * blockDim.x) p.tickets[i] = 0;
  __syncthreads();  // all have read the length
  if (threadIdx.x) return;
  if (fits) meta[kLength] = start + wanted, meta[kNextPosition] = next + wanted;
  else atomicOr(meta + kErrors, kFull);
}
#else
// Copies counts[i] leading tokens (or all n) of sequence i to its rows from starts[i]. A sequence with no room for them keeps its
// rows, and gets error bit 1; one of whose tokens holds NaN or infinity gets bit 0, and the rows all the same.
//
// Grid (x, y, b), y a divisor of h, whose heads the blocks share in order. Block: a multiple of 32, at most 1024; shared memory 8
// bytes.
// Precondition: h / y * n * (key_vectors + value_vectors) + 4 * block * x < 2^31. The caller's counts are clamped to [0, n].
// Deterministic. Rows may still be on their way when the length is written, so a reader of them starts after the kernel.
extern "C" __global__ void __launch_bounds__(1024) saap_append(const __grid_constant__ AppendParams p) {
  SAAP_SHARED(int, shared);
  const int sequence = blockIdx.z, heads = p.heads / static_cast<int>(gridDim.y), head = blockIdx.y * heads;
  const u32 vectors = p.key_vectors + p.value_vectors, n = p.n, total = heads * n * vectors;
  const u32 step = gridDim.x * blockDim.x;
  const char* keys = p.keys + sequence * p.key_b + head * p.key_h;
  const char* values = p.values + sequence * p.value_b + head * p.value_h;
  const i64 arena = (static_cast<i64>(sequence) * p.heads + head) * p.capacity;
  grid_dependency_launch();  // at once: what follows waits for the end of this kernel, and so for the end of those in front of it
  grid_dependency_wait();

  bool bad = false, placed = false;
  u32 from = blockIdx.x * blockDim.x + threadIdx.x;
  do {
    uint4 data[kAhead];
    u32 token[kAhead], of[kAhead], at[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const u32 v = from + i * step, line = v / vectors;
      at[i] = v - line * vectors, of[i] = line / n, token[i] = v < total ? line - of[i] * n : ~0u;
      if (v >= total) continue;
      const bool key = at[i] < static_cast<u32>(p.key_vectors);
      const char* row = key ? keys + of[i] * p.key_h + token[i] * p.key_n : values + of[i] * p.value_h + token[i] * p.value_n;
      data[i] = read_vector(row + (key ? at[i] : at[i] - p.key_vectors) * 16, p.aligned);
    }
    if (!placed) {  // once, by all threads, while the first vectors are on their way
      if (threadIdx.x == 0) {
        const int wanted = p.counts ? min(max(p.counts[sequence], 0), p.n) : p.n;
        const int start = p.starts[sequence];
        const bool fits = start >= 0 && wanted <= p.capacity - start;
        shared[0] = start;
        shared[1] = fits ? wanted : 0;
        if (!fits && blockIdx.x == 0 && blockIdx.y == 0) atomicOr(p.flags + sequence, kFull);
      }
      __syncthreads();
      placed = true;
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (token[i] >= static_cast<u32>(shared[1])) continue;
      const i64 row = arena + static_cast<i64>(of[i]) * p.capacity + shared[0] + token[i];
      char* to = at[i] < static_cast<u32>(p.key_vectors) ? p.arena_keys + (row * p.key_vectors + at[i]) * 16
                                                         : p.arena_values + (row * p.value_vectors + at[i] - p.key_vectors) * 16;
      *reinterpret_cast<uint4*>(to) = data[i];
      bad |= not_finite(data[i].x, p.high_exponent, p.low_exponent) || not_finite(data[i].y, p.high_exponent, p.low_exponent) ||
             not_finite(data[i].z, p.high_exponent, p.low_exponent) || not_finite(data[i].w, p.high_exponent, p.low_exponent);
    }
    from += kAhead * step;
  } while (from < total);
  if (bad) atomicOr(p.flags + sequence, kNotFinite);
}
#endif

#ifdef SAAP_EMU
extern "C" int saap_sizeof_append() { return sizeof(AppendParams); }
#endif
