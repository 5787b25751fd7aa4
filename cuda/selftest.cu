// Runs every primitive of prims.cuh on given words, so that a device can be compared with the CPU bodies. One kernel per family;
// all take the same parameters.
//
// in : u32 (n,), out : u32, sizes below; 16-byte aligned. flags : int32 (2 * blocks,), zero. Blocks of kThreads, kSharedBytes of
// shared memory each. All but `order`, `cluster` and `relay` use one block. Deterministic under any schedule of the blocks.
#include "prims.cuh"

struct SelftestParams {
  const u32* in;
  u32* out;
  int* flags;
  int n;
};

constexpr int kThreads = 64, kSharedBytes = 4096;

SAAP_PRIM u32 bits(float x) { return __float_as_uint(x); }

// out (n, 9): widen of both types, narrow of both, narrow2 of both with the next word, load and store of float32 and of fp16,
// sub_f16x2 of the next word.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_convert(const __grid_constant__ SelftestParams p) {
  for (int i = threadIdx.x; i < p.n; i += kThreads) {
    const float x = __uint_as_float(p.in[i]), next = __uint_as_float(p.in[(i + 1) % p.n]);
    const u16 low = static_cast<u16>(p.in[i]);
    u32* out = p.out + 9 * static_cast<i64>(i);
    out[0] = bits(widen<kBF16>(low));
    out[1] = bits(widen<kF16>(low));
    out[2] = narrow<kBF16>(x) | static_cast<u32>(narrow<kF16>(x)) << 16;
    out[3] = narrow2<kBF16>(x, next);
    out[4] = narrow2<kF16>(x, next);
    store<kF32>(out, 5, load<kF32>(p.in, i));
    out[6] = bits(load<kF16>(p.in, 2 * static_cast<i64>(i)));
    out[7] = 0;
    store<kBF16>(out, 14, load<kBF16>(p.in, 2 * static_cast<i64>(i)));
    out[8] = sub_f16x2(p.in[i], p.in[(i + 1) % p.n]);
  }
}

// out (n, 4): exp2_fast, log2_fast, sine and cosine of pi * 1e6 * x.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_math(const __grid_constant__ SelftestParams p) {
  for (int i = threadIdx.x; i < p.n; i += kThreads) {
    const float x = __uint_as_float(p.in[i]);
    u32* out = p.out + 4 * static_cast<i64>(i);
    float sine, cosine;
    sinpi_cospi(1e6 * static_cast<double>(x), &sine, &cosine);
    out[0] = bits(exp2_fast(x)), out[1] = bits(log2_fast(x)), out[2] = bits(sine), out[3] = bits(cosine);
  }
}

// n = 4 * kThreads * kRounds. out (n,): 16 bytes per thread and round through shared memory, two groups in flight, those whose
// number (kThreads * round + thread) is a multiple of 5 replaced by zeros. Then out (2, n): the same words by the loads.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_copy(const __grid_constant__ SelftestParams p) {
  SAAP_SHARED(u32, shared);
  const int rounds = p.n / (4 * kThreads), thread = threadIdx.x;
  auto fetch = [&](int round) {
    const int unit = kThreads * round + thread;
    const u32* from = p.in + 4 * unit;
    if (round < rounds) cp_async16(shared + (round % 3 * kThreads + thread) * 4, from, unit % 5 != 0);
    cp_async_commit();
  };
  fetch(0);
  fetch(1);
  for (int round = 0; round < rounds; round++) {
    fetch(round + 2);
    cp_async_wait<2>();
    __syncthreads();
    // what another thread fetched
    const int other = thread ^ 37, unit = kThreads * round + other;
    for (int i = 0; i < 4; i++) p.out[4 * unit + i] = shared[(round % 3 * kThreads + other) * 4 + i];
    __syncthreads();
  }
  for (int unit = thread; unit < p.n / 4; unit += kThreads) {
    const u32* from = p.in + 4 * unit;
    u32* out = p.out + p.n + 4 * unit;
    const uint4 a = ld_stream16(from);
    const float4 b = ld_l2_16(from);
    const float2 c = ld_l2_8(from), d = ld_l2_8(from + 2);
    out[0] = a.x, out[1] = bits(b.y), out[2] = a.z ^ bits(b.z) ^ bits(d.x), out[3] = a.w ^ bits(b.w) ^ bits(d.y);
    p.out[2 * p.n + unit] = bits(c.x) ^ bits(c.y);
  }
}

// n = 128, the words of a 32 x 8 matrix of 16-bit elements. out (32, 9) by lane: ldmatrix4 of its rows in reverse order,
// ldmatrix4_trans of the same, movmatrix_trans of the lane's word.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_matrix(const __grid_constant__ SelftestParams p) {
  SAAP_SHARED(u32, shared);
  for (int i = threadIdx.x; i < 128; i += kThreads) shared[i] = p.in[i];
  __syncthreads();
  const int lane = threadIdx.x;
  if (lane >= 32) return;
  u32 a[4], b[4];
  ldmatrix4(a, shared + 4 * (31 - lane));
  ldmatrix4_trans(b, shared + 4 * (31 - lane));
  for (int i = 0; i < 4; i++) p.out[9 * lane + i] = a[i], p.out[9 * lane + 4 + i] = b[i];
  p.out[9 * lane + 8] = movmatrix_trans(p.in[lane]);
}

// n = 10 * 32, by lane: four words of a, two of b, four floats c. out (32, 4) floats: c + a b.
template <int T>
SAAP_PRIM void multiply(const SelftestParams& p, u32* out) {
  const u32* in = p.in + 10 * threadIdx.x;
  const u32 a[4] = {in[0], in[1], in[2], in[3]};
  float c[4] = {__uint_as_float(in[6]), __uint_as_float(in[7]), __uint_as_float(in[8]), __uint_as_float(in[9])};
  mma_16816<T>(c, a, in[4], in[5]);
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = bits(c[i]);
}

// out (2, 32, 4): of bf16, then of fp16.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_mma(const __grid_constant__ SelftestParams p) {
  if (threadIdx.x >= 32) return;
  multiply<kBF16>(p, p.out);
  multiply<kF16>(p, p.out + 128);
}

// n = kThreads. out (kThreads, 16): what lanes get from each other, in both halves of a warp apart where a mask is taken.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_warp(const __grid_constant__ SelftestParams p) {
  const int lane = threadIdx.x % 32;
  const u32 all = ~0u, half = lane < 16 ? 0xffffu : 0xffff0000u, x = p.in[threadIdx.x];
  const int small = static_cast<int>(x % 7);
  u32* out = p.out + 16 * threadIdx.x;
  out[0] = __shfl_sync(all, x, small);
  out[1] = __shfl_sync(all, x, small + 9, 8);
  out[2] = bits(__shfl_xor_sync(all, __uint_as_float(x), 5));
  out[3] = __shfl_xor_sync(half, x, 12);
  out[4] = __shfl_up_sync(all, x, 3);
  out[5] = __shfl_up_sync(all, x, 2, 4);
  out[6] = __shfl_down_sync(all, x, 3);
  out[7] = __shfl_down_sync(half, x, 3, 16);
  out[8] = __ballot_sync(all, x & 1);
  out[9] = __any_sync(half, small == 3) * 2 + __all_sync(half, small < 6);
  out[10] = __match_any_sync(all, small);
  out[11] = __reduce_add_sync(half, x);
  out[12] = static_cast<u32>(__reduce_min_sync(all, static_cast<int>(x)));
  out[13] = __reduce_max_sync(all, x) ^ __reduce_xor_sync(all, x);
  out[14] = static_cast<u32>(__syncthreads_count(x & 2));
  out[15] = static_cast<u32>(__syncthreads_or(small == 6) * 2 + __syncthreads_and(small < 6));
}

// n <= kThreads * blocks. out (3,): the sum of all words, found by the block that comes last; the
// number of blocks; the largest word (to be 0 before). Behind them `blocks` words of workspace. flags are left zero.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_order(const __grid_constant__ SelftestParams p) {
  SAAP_SHARED(int, shared);
  const int blocks = gridDim.x, block = blockIdx.x, i = kThreads * block + threadIdx.x;
  u32* sums = p.out + 3;
  if (threadIdx.x == 0) shared[0] = 0;
  __syncthreads();
  if (i < p.n) {
    atomicAdd(shared, static_cast<int>(p.in[i]));
    atomicMax(p.out + 2, p.in[i]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sums[block] = static_cast<u32>(shared[0]);
    st_release(p.flags + 1 + block, 1);
    __threadfence();
    shared[1] = atomicAdd(p.flags, 1);
    __threadfence();
  }
  __syncthreads();
  if (shared[1] != blocks - 1 || threadIdx.x != 0) return;
  u32 sum = 0, seen = 0;
  for (int other = 0; other < blocks; other++) {
    seen += static_cast<u32>(ld_acquire(p.flags + 1 + other));
    sum += sums[other];
    p.flags[1 + other] = 0;
  }
  p.out[0] = sum, p.out[1] = seen;
  p.flags[0] = 0;
}

// n = kThreads * blocks, in clusters of any size. out (n, 4): the word of the same thread in the next block of the cluster, loaded; in
// the next block but one, handed on by a store; the sum of the cluster's words, by atomics on its first block and a load from it;
// rank + 256 * size of the cluster.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_cluster(const __grid_constant__ SelftestParams p) {
  SAAP_SHARED(u32, shared);
  u32 *words = shared, *stored = shared + kThreads, *sum = shared + 2 * kThreads;
  const int thread = threadIdx.x, rank = cluster_rank(), size = cluster_size();
  const i64 i = static_cast<i64>(kThreads) * blockIdx.x + thread;
  words[thread] = p.in[i];
  if (thread == 0) *sum = 0;
  cluster_barrier();
  const int next = (rank + 1) % size, last = (rank + size - 1) % size;
  const u32 loaded = of_block(words, next)[thread];
  of_block(stored, last)[thread] = loaded;
  atomicAdd(of_block(sum, 0), p.in[i]);
  cluster_barrier();
  u32* out = p.out + 4 * i;
  out[0] = loaded, out[1] = stored[thread], out[2] = *of_block(sum, 0);
  out[3] = static_cast<u32>(rank + 256 * size);
  cluster_barrier();
}

// n = kThreads * blocks, started several times in a row as dependent launches, each reading what the one before wrote, its last words
// first. out (n,): 2654435761 * in[n - 1 - i] + 1. The first block is late on purpose.
extern "C" __global__ void __launch_bounds__(kThreads) saap_selftest_relay(const __grid_constant__ SelftestParams p) {
  const int i = kThreads * blockIdx.x + threadIdx.x;
  grid_dependency_launch();
  if (threadIdx.x == 0) grid_dependency_wait();
  __syncthreads();
  if (blockIdx.x == 0) __nanosleep(20000);
  p.out[i] = 2654435761u * p.in[p.n - 1 - i] + 1;
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_selftest() { return static_cast<int>(sizeof(SelftestParams)); }
#endif
