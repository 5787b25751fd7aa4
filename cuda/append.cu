// Appending: new keys and values go behind the rows in use, for a token or for a prompt.
#include "prims.cuh"

struct AppendParams {
  const char *keys, *values;         // new tokens, (b, h, n, d) and (b, h, n, e), strides below
  char *arena_keys, *arena_values;   // (b, h, N, d), (b, h, N, e), contiguous, 16-byte aligned
  int* meta;                         // (b, 8), or null: starts and flags are used
  const int* starts;                 // (b), where meta is null: first row of each sequence
  const int* counts;                 // (b), or null: all n tokens of each sequence
  int* flags;                        // (b), where meta is null: error bits, set but never cleared
  u32* tickets;                      // (b), where meta is given: zero before and after
  i64 key_b, key_h, key_n;           // strides in bytes
  i64 value_b, value_h, value_n;
  int n, capacity;                   // tokens in keys and values; N
  int key_vectors, value_vectors;    // row lengths in units of 16 bytes
  u32 high_exponent, low_exponent;   // see not_finite
  int aligned;                       // keys, values and all strides are multiples of 16 bytes
};

namespace {

constexpr int kLength = 0, kNextPosition = 4, kErrors = 7, kMetaWords = 8;
constexpr int kNotFinite = 1, kFull = 2;
constexpr int kAhead = 4;  // vectors of a thread in flight

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

}  // namespace

// Copies counts[i] leading tokens (or all n) of sequence i to its rows from starts[i], or from its length if meta is given;
// then length and next_position grow by as many. A sequence with no room for them keeps its rows and its length, and gets error
// bit 1; one of whose tokens holds NaN or infinity gets bit 0, and the rows all the same.
//
// Grid (x, h, b), any x >= 1; block: a multiple of 32, at most 256; shared memory 8 bytes.
// Precondition: n * (key_vectors + value_vectors) + 4 * 256 * x < 2^31. The caller's counts are clamped to [0, n].
// Deterministic. The length is written by the block that comes last of those of a sequence, when all have read it; rows may
// still be on their way then, so a reader of them starts after the kernel.
extern "C" __global__ void __launch_bounds__(256) saap_append(const __grid_constant__ AppendParams p) {
  SAAP_SHARED(int, shared);
  const int head = blockIdx.y, sequence = blockIdx.z, heads = gridDim.y;
  const int vectors = p.key_vectors + p.value_vectors, total = p.n * vectors;
  const int step = gridDim.x * blockDim.x;
  const char* keys = p.keys + sequence * p.key_b + head * p.key_h;
  const char* values = p.values + sequence * p.value_b + head * p.value_h;

  uint4 data[kAhead];
  auto fetch = [&](int from) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int v = from + i * step, token = v / vectors, at = v - token * vectors;
      if (v < total)
        data[i] = at < p.key_vectors ? read_vector(keys + token * p.key_n + at * 16, p.aligned)
                                     : read_vector(values + token * p.value_n + (at - p.key_vectors) * 16, p.aligned);
    }
  };
  int from = blockIdx.x * blockDim.x + threadIdx.x;
  fetch(from);  // does not depend on the length: the two reads overlap

  int* meta = p.meta ? p.meta + sequence * kMetaWords : nullptr;
  int* errors = p.meta ? meta + kErrors : p.flags + sequence;
  if (threadIdx.x == 0) {
    const int wanted = p.counts ? min(max(p.counts[sequence], 0), p.n) : p.n;
    const int start = p.meta ? meta[kLength] : p.starts[sequence];
    const bool fits = start >= 0 && wanted <= p.capacity - start;
    shared[0] = start;
    shared[1] = fits ? wanted : 0;
    if (!fits && blockIdx.x == 0 && head == 0) atomicOr(errors, kFull);
  }
  __syncthreads();
  // The other threads write rows meanwhile. The first alone has read the length.
  if (threadIdx.x == 0 && p.meta) {
    __threadfence();
    const u32 blocks = gridDim.x * gridDim.y;
    if (atomicAdd(p.tickets + sequence, 1u) == blocks - 1) {
      __threadfence();
      atomicAdd(p.tickets + sequence, 0u - blocks);
      meta[kLength] = shared[0] + shared[1];
      meta[kNextPosition] += shared[1];
    }
  }
  const int start = shared[0], end = shared[1] * vectors;
  const i64 row = (static_cast<i64>(sequence) * heads + head) * p.capacity + start;
  char* arena_keys = p.arena_keys + row * p.key_vectors * 16;
  char* arena_values = p.arena_values + row * p.value_vectors * 16;

  bool bad = false;
  while (from < end) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int v = from + i * step, token = v / vectors, at = v - token * vectors;
      if (v >= end) continue;
      char* to = at < p.key_vectors ? arena_keys + (static_cast<i64>(token) * p.key_vectors + at) * 16
                                    : arena_values + (static_cast<i64>(token) * p.value_vectors + at - p.key_vectors) * 16;
      *reinterpret_cast<uint4*>(to) = data[i];
      bad |= not_finite(data[i].x, p.high_exponent, p.low_exponent) || not_finite(data[i].y, p.high_exponent, p.low_exponent) ||
             not_finite(data[i].z, p.high_exponent, p.low_exponent) || not_finite(data[i].w, p.high_exponent, p.low_exponent);
    }
    from += kAhead * step;
    fetch(from);
  }
  if (bad) atomicOr(errors, kNotFinite);
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_append() { return sizeof(AppendParams); }
#endif
