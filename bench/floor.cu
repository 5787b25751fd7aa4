// What any kernel costs on a device, whatever it computes: launches, a read of memory, barriers and loads within a cluster.
typedef unsigned int u32;
typedef long long i64;

struct Nothing {
  void* at;
};

extern "C" __global__ void empty(const __grid_constant__ Nothing p) {}

// The same under programmatic dependent launch.
extern "C" __global__ void empty_dependent(const __grid_constant__ Nothing p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Read {
  const uint4* from;  // (n)
  u32* sum;           // never written, unless the sum is this very number
  i64 n;
};

// Grid (x), block 512: reads n vectors of 16 bytes.
extern "C" __global__ void __launch_bounds__(512) read_only(const __grid_constant__ Read p) {
  u32 sum = 0;
  const i64 step = static_cast<i64>(gridDim.x) * 512;
  i64 i = static_cast<i64>(blockIdx.x) * 512 + threadIdx.x;
  for (; i + 7 * step < p.n; i += 8 * step) {
    uint4 x[8];
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = __ldcs(p.from + i + k * step);
#pragma unroll
    for (int k = 0; k < 8; k++) sum ^= x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
  }
  for (; i < p.n; i += step) sum ^= p.from[i].x;
  if (sum == 0x12345678u) *p.sum = sum;
}

struct Clocks {
  i64* cycles;  // (4): of a cluster barrier, a dependent load from another block's shared memory, one from L2, a block barrier
  const u32* zeros;  // (32)
};

// Grid (8), cluster (8), block 256.
extern "C" __global__ void cluster_clocks(const __grid_constant__ Clocks p) {
#if __CUDA_ARCH__ >= 900
  __shared__ u32 zero[32];
  if (threadIdx.x < 32) zero[threadIdx.x] = 0;
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  const i64 a = clock64();
  for (int i = 0; i < 16; i++)
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  const i64 b = clock64();
  u32 own = static_cast<u32>(__cvta_generic_to_shared(zero)), other, x = 0;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(own), "r"((blockIdx.x + 1) % 8));
  for (int i = 0; i < 16; i++) asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(other + x) : "memory");
  const i64 c = clock64();
  for (int i = 0; i < 16; i++) asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(p.zeros + x) : "memory");
  const i64 d = clock64();
  for (int i = 0; i < 16; i++) __syncthreads();
  const i64 e = clock64();
  if (blockIdx.x == 0 && threadIdx.x == 0)
    p.cycles[0] = (b - a) / 16, p.cycles[1] = (c - b) / 16 + x, p.cycles[2] = (d - c) / 16, p.cycles[3] = (e - d) / 16;
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

struct Chase {
  i64* cycles;  // (2): of a dependent load from device memory, of 128 bytes of code at their first run
  const u32* zeros;  // 64 steps
  i64 step;     // between loads, in words: more of them than the second cache holds
};

// Grid (1), block 32.
extern "C" __global__ void chase(const __grid_constant__ Chase p) {
  u32 x = 0, a[4] = {threadIdx.x, 1, 2, 3};
  const i64 began = clock64();
  for (int i = 0; i < 64; i++) asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(p.zeros + i * p.step + x) : "memory");
  const i64 loaded = clock64();
#pragma unroll
  for (int i = 0; i < 4096; i++) asm volatile("mad.lo.u32 %0, %0, %1, %1;" : "+r"(a[i % 4]) : "r"(x + 3));
  const i64 ended = clock64();
  if (threadIdx.x == 0) p.cycles[0] = (loaded - began) / 64, p.cycles[1] = (ended - loaded) / (4096 * 16 / 128);
  if (a[0] + a[1] + a[2] + a[3] == 0x12345678u) p.cycles[0] = 0;
}
