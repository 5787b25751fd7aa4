// Making codes of rows that are about to be sealed, and putting together what two scans read of codes and of numbers.
#include "codes.cuh"
#include "softmax_state.cuh"

struct EncodeParams {
  const void* rows;      // dtype `type` (h, n, dim), strides below, elements of a row contiguous
  u32* codes;            // out (h, n, words), stride below, a row contiguous
  i64 head, row;         // strides of rows in elements
  i64 code_head;         // stride of codes in words
  int type, n, dim, bits;
};

struct JoinParams {
  const void* out_a;     // dtype TQ (n, e): of numbers
  const float* lse_a;    // float32 (n)
  const float* out_b;    // float32 (n, e): of codes, rotated if values have 4 bits
  const float* lse_b;    // float32 (n)
  void* out;             // dtype TQ (n, e)
  float* lse;            // float32 (n)
  i64 n;
  int type, e, bits;
};

namespace {

constexpr int kThreads = 128, kWarps = 4, kMaxDim = 256;
constexpr double kGauss = 46.476;
constexpr int kLevels[8] = {6, 18, 31, 44, 58, 75, 96, 127};

SAAP_PRIM float sign_of(int i) { return static_cast<u32>(i + 1) * 0x9E3779B1u >> 31 ? -1.f : 1.f; }

// Of a float's bits what they stand for: subnormals too, which float arithmetic flushes here.
SAAP_PRIM double exact(u32 bits) {
  const u32 size = bits & 0x7fffffffu;
  const double x = size >> 23 ? static_cast<double>(__uint_as_float(size)) : static_cast<double>(size) * 0x1p-149;
  return bits >> 31 ? -x : x;
}

// The bits of the nearest float, ties to even.
SAAP_PRIM u32 rounded(double x) {
  const double size = x < 0 ? -x : x;
  const u32 bits = size < 0x1p-126 ? static_cast<u32>(rint(size * 0x1p149)) : __float_as_uint(static_cast<float>(size));
  return x < 0 ? bits | 0x80000000u : bits;
}

SAAP_PRIM u32 bits_at(const void* base, int type, i64 index) {
  if (type == kF32) return static_cast<const u32*>(base)[index];
  const u16 half = static_cast<const u16*>(base)[index];
  return type == kBF16 ? static_cast<u32>(half) << 16 : __float_as_uint(widen<kF16>(half));
}

// All lanes: a Walsh-Hadamard transform of each block, powers of two that make up dim, in the order of additions of reference.rotate.
template <class T>
SAAP_PRIM void hadamard(T* x, int dim) {
  for (int start = 0, left = dim; left;) {
    int size = 1;
    while (2 * size <= left) size *= 2;
    for (int half = 1; half < size; half *= 2) {
      for (int pair = threadIdx.x % 32; pair < size / 2; pair += 32) {
        const int i = start + pair / half * 2 * half + pair % half;
        const T a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
      __syncwarp();
    }
    const T scale = static_cast<T>(1 / sqrt(static_cast<double>(size)));
    for (int i = threadIdx.x % 32; i < size; i += 32) x[start + i] *= scale;
    __syncwarp();
    start += size, left -= size;
  }
}

// All lanes: the second half added to the first until one is left. Overwrites x, which has room for a power of two.
SAAP_PRIM double pairwise_sum(double* x, int dim) {
  int size = 1;
  while (size < dim) size *= 2;
  for (int i = dim + threadIdx.x % 32; i < size; i += 32) x[i] = 0;
  __syncwarp();
  for (; size > 1; size /= 2) {
    for (int i = threadIdx.x % 32; i < size / 2; i += 32) x[i] += x[i + size / 2];
    __syncwarp();
  }
  const double sum = x[0];
  __syncwarp();
  return sum;
}

SAAP_PRIM void encode8(const EncodeParams& p, i64 first, u32* code) {
  const int lane = threadIdx.x % 32;
  u32 top = 0;
  for (int i = lane; i < p.dim; i += 32) top = max(top, bits_at(p.rows, p.type, first + i) & 0x7fffffffu);
#pragma unroll
  for (int o = 16; o; o /= 2) top = max(top, __shfl_xor_sync(~0u, top, o));
  const u32 scale_bits = rounded(exact(top) / 127);
  const double scale = exact(scale_bits);
  for (int word = lane; word < p.dim / 4; word += 32) {
    u32 four = 0;
    for (int k = 0; k < 4; k++) {
      // A quotient of floats, rounded to double and then to float, is the float quotient.
      const double x = exact(bits_at(p.rows, p.type, first + word * 4 + k));
      const int number = scale > 0 ? __float2int_rn(static_cast<float>(x / scale)) : 0;
      four |= (static_cast<u32>(min(max(number, -127), 127)) & 255u) << 8 * k;
    }
    code[word] = four;
  }
  if (lane == 0) code[p.dim / 4] = scale_bits;
}

// x, y: 256 doubles each, numbers: 256 bytes, the warp's own.
SAAP_PRIM void encode4(const EncodeParams& p, i64 first, u32* code, double* x, double* y, unsigned char* numbers) {
  const int lane = threadIdx.x % 32, dim = p.dim;
  for (int i = lane; i < dim; i += 32) x[i] = exact(bits_at(p.rows, p.type, first + i)) * sign_of(i);
  __syncwarp();
  hadamard(x, dim);
  const double largest = 3.4028234663852886e38;
  for (int i = lane; i < dim; i += 32) {
    x[i] = exact(rounded(fmin(fmax(x[i], -largest), largest)));
    y[i] = x[i] * x[i];
  }
  __syncwarp();
  const double unit = sqrt(pairwise_sum(y, dim) / dim) / kGauss, divisor = unit > 0 ? unit : 1;
  for (int i = lane; i < dim; i += 32) {
    const double part = x[i] / divisor, size = part < 0 ? -part : part;
    int index = 0, level = kLevels[0];
#pragma unroll
    for (int k = 0; k < 7; k++)
      if (size > (kLevels[k] + kLevels[k + 1]) / 2.0) index = k + 1, level = kLevels[k + 1];
    numbers[i] = static_cast<unsigned char>(part < 0 ? index + 8 : index);
    x[i] *= part < 0 ? -level : level;
    y[i] = level * level;
  }
  __syncwarp();
  const double products = pairwise_sum(x, dim), squares = pairwise_sum(y, dim);
  for (int word = lane; word < dim / 8; word += 32) {
    u32 bytes = 0;
    for (int k = 0; k < 8; k++) {
      const int byte = word * 4 + k / 2, start = byte / 16 * kRunOfNumbers, half = min(kRunOfNumbers, dim - start) / 2;
      bytes |= static_cast<u32>(numbers[start + byte - start / 2 + k % 2 * half]) << 4 * k;
    }
    code[word] = bytes;
  }
  if (lane == 0) code[dim / 8] = rounded(products / squares);
  __syncwarp();
}

}  // namespace

// Codes of rows, as reference.encode specifies, the same bytes. A warp per row. Grid (any, heads); block kThreads; shared memory
// kWarps * (2 * 256 * 8 + 256) bytes. dim: a multiple of 8, at most 256; bits: 8 or 4.
extern "C" __global__ void __launch_bounds__(kThreads) saap_encode(const __grid_constant__ EncodeParams p) {
  SAAP_SHARED(double, shared);
  const int warp = threadIdx.x / 32, words = p.dim * p.bits / 32 + 1;
  double* const x = shared + warp * 2 * kMaxDim;
  unsigned char* const numbers = reinterpret_cast<unsigned char*>(shared + kWarps * 2 * kMaxDim) + warp * kMaxDim;
  for (i64 row = static_cast<i64>(blockIdx.x) * kWarps + warp; row < p.n; row += static_cast<i64>(gridDim.x) * kWarps) {
    const i64 first = blockIdx.y * p.head + row * p.row;
    u32* const code = p.codes + blockIdx.y * p.code_head + row * words;
    if (p.bits == 8) encode8(p, first, code);
    else encode4(p, first, code, x, x + kMaxDim, numbers);
  }
}

// The union of two states over disjoint tokens, the second of codes: rotated back first, if they have 4 bits. As combine.cu, a warp per
// row; grid (any); block kThreads; shared memory kWarps * 256 floats.
extern "C" __global__ void __launch_bounds__(kThreads) saap_join_codes(const __grid_constant__ JoinParams p) {
  SAAP_SHARED(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const x = shared + warp * kMaxDim;
  for (i64 row = static_cast<i64>(blockIdx.x) * kWarps + warp; row < p.n; row += static_cast<i64>(gridDim.x) * kWarps) {
    saap::softmax_mass mass = saap::softmax_mass::from_lse(p.lse_a[row]);
    float keep, take;
    mass.join(saap::softmax_mass::from_lse(p.lse_b[row]), keep, take);
    const float inverse = mass.inverse();
    keep *= inverse, take *= inverse;
    for (int i = lane; i < p.e; i += 32) x[i] = take != 0.f ? p.out_b[row * p.e + i] * take : 0.f;
    __syncwarp();
    if (p.bits == 4) hadamard(x, p.e);
    for (int i = lane; i < p.e; i += 32) {
      const float b = p.bits == 4 ? x[i] * sign_of(i) : x[i];
      const i64 at = row * p.e + i;
      if (p.type == kF32) {
        store<kF32>(p.out, at, (keep != 0.f ? load<kF32>(p.out_a, at) * keep : 0.f) + b);
      } else if (p.type == kBF16) {
        store<kBF16>(p.out, at, (keep != 0.f ? load<kBF16>(p.out_a, at) * keep : 0.f) + b);
      } else {
        store<kF16>(p.out, at, (keep != 0.f ? load<kF16>(p.out_a, at) * keep : 0.f) + b);
      }
    }
    if (lane == 0) p.lse[row] = mass.lse();
    __syncwarp();
  }
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_encode() { return static_cast<int>(sizeof(EncodeParams)); }
extern "C" int saap_sizeof_join_codes() { return static_cast<int>(sizeof(JoinParams)); }
#endif
