// Bugs, one per value of `plant`, which the emulator has to report with a line that names the plant in its last comment. Below 10
// there is no bug; of 10 to 99 the output tells.
#include "prims.cuh"

struct PlantedParams {
  const u16* global;  // uint16 (512,)
  float* out;         // float32 (256,)
  int* flags;         // int32 (8,), zero
  int plant;
};

constexpr int kThreads = 64;

SAAP_PRIM void fetch(const PlantedParams& p, u16* shared, int wait) {
  cp_async16(shared + 8 * threadIdx.x, p.global + 8 * threadIdx.x, true);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  __syncthreads();
  p.out[threadIdx.x] = widen<kF16>(shared[8 * threadIdx.x]);
}

// Every thread writes a word of the block's, one of the last block's threads sums the words of all blocks.
SAAP_PRIM void tickets(const PlantedParams& p, int* shared, bool before, bool after, bool late) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (!late) p.out[i] = 1.f;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (before) __threadfence();
    if (late) p.out[i] = 1.f;  // 106
    shared[0] = atomicAdd(p.flags, 1);
    if (after) __threadfence();
  }
  __syncthreads();
  if (shared[0] == static_cast<int>(gridDim.x) - 1 && threadIdx.x == 1) {
    float sum = 0;
    for (int k = 0; k < static_cast<int>(gridDim.x) * (late ? 1 : kThreads); k++)
      sum += p.out[late ? k * kThreads : k];  // 104 105 106
    p.flags[1] = static_cast<int>(sum);
  }
}

SAAP_PRIM int bin_of(const PlantedParams& p) { return p.global[kThreads * blockIdx.x + threadIdx.x] / 32 % 16; }

// Each block counts its words, then sums some of the 16 bins over the blocks of its cluster.
SAAP_PRIM void histogram(const PlantedParams& p, int* bins, bool counted, bool used) {
  const int thread = threadIdx.x, size = cluster_size();
  if (thread < 16) bins[thread] = 0;
  __syncthreads();
  atomicAdd(bins + bin_of(p), 1);  // 108
  if (counted)
    cluster_barrier();
  else
    __syncthreads();
  if (thread < 16 && thread % size == cluster_rank()) {
    int sum = 0;
    for (int other = 0; other < size; other++) sum += of_block(bins, other)[thread];  // 108 109
    p.out[blockIdx.x / size * 16 + thread] = static_cast<float>(sum);
  }
  if (used) cluster_barrier();
}

// The same, counted where the first block of the cluster has its bins.
SAAP_PRIM void count_together(const PlantedParams& p, int* bins, bool summed) {
  if (threadIdx.x < 16) bins[threadIdx.x] = 0;
  cluster_barrier();
  atomicAdd(of_block(bins, 0) + bin_of(p), 1);  // 111
  if (summed) cluster_barrier();
  __syncthreads();
  if (cluster_rank() == 0 && threadIdx.x < 16)
    p.out[blockIdx.x / cluster_size() * 16 + threadIdx.x] = static_cast<float>(bins[threadIdx.x]);  // 111
}

extern "C" __global__ void planted(const __grid_constant__ PlantedParams p) {
  SAAP_SHARED(int, shared);
  const int thread = threadIdx.x, lane = thread % 32;
  u16* halves = reinterpret_cast<u16*>(shared);
  u32 r[4] = {};
  float c[4] = {};
  switch (p.plant) {
    // correct
    case 0: fetch(p, halves, 1); break;
    case 1: tickets(p, shared, true, true, false); break;
    case 2:  // lanes apart, then together again
      if (lane < 8) c[0] = static_cast<float>(__shfl_xor_sync(0xffu, lane, 1));
      if (lane >= 24) c[0] = static_cast<float>(__shfl_xor_sync(0xff000000u, lane, 2));
      __syncwarp();
      p.out[thread] = c[0];
      break;
    case 3:  // threads return before the others meet
      if (thread >= 40) return;
      __syncthreads();
      p.out[thread] = static_cast<float>(__ballot_sync(__ballot_sync(~0u, 1), 1) & 0xff);
      break;
    case 4:  // handed on by a flag; the second block of a grid of two
      if (thread == 0 && blockIdx.x == 0) p.out[0] = 7.f, st_release(p.flags, 1);
      if (thread == 0 && blockIdx.x == 1) {
        while (ld_acquire(p.flags) == 0) {}
        p.out[1] = p.out[0];
      }
      break;
    case 5: histogram(p, shared, true, true); break;
    case 6: count_together(p, shared, true); break;
    case 7:  // the barrier of a cluster in two places, and a block that returns before the others
      if (cluster_rank() == 1) cluster_barrier();
      else cluster_barrier();
      if (cluster_rank() == cluster_size() - 1) return;
      cluster_barrier();
      p.out[blockIdx.x * kThreads + thread] = 1.f;
      break;
    case 8:  // of a launch that depends on the one before
      if (thread == 0) grid_dependency_wait();
      __syncthreads();
      p.out[blockIdx.x * kThreads + thread] = static_cast<float>(p.flags[0]);
      grid_dependency_launch();
      break;
    // values
    case 10: fetch(p, halves, 0); break;  // not waited for
    case 11:                              // the stage is filled again while others read it
      fetch(p, halves, 1);
      __syncthreads();
      cp_async16(halves + 8 * thread, p.global, true);
      __syncthreads();
      p.out[thread] = widen<kF16>(halves[8 * (thread ^ 1)]);
      break;
    case 12: p.out[thread] = __int_as_float(shared[thread]); break;  // never written
    // races
    case 100:
      shared[thread] = thread;                                     // 100
      p.out[thread] = static_cast<float>(shared[thread ^ 40]);     // 100
      break;
    case 101:
      shared[thread] = thread;
      __ballot_sync(~0u, 1);
      p.out[thread] = static_cast<float>(shared[thread ^ 1]);      // 101
      break;
    case 102:
      cp_async16(halves + 8 * thread, p.global + 8 * thread, true);
      cp_async_commit();
      __syncthreads();
      cp_async_wait<0>();
      p.out[thread] = widen<kF16>(halves[8 * (thread ^ 1)]);       // 102
      break;
    case 103: p.out[lane] = static_cast<float>(thread); break;     // 103
    case 104: tickets(p, shared, false, true, false); break;
    case 105: tickets(p, shared, true, false, false); break;
    case 106: tickets(p, shared, true, true, true); break;
    case 107:
      if (thread == 0) atomicAdd(p.flags, 1);
      if (thread == 63) p.out[0] = static_cast<float>(p.flags[0]);  // 107
      break;
    case 108: histogram(p, shared, false, true); break;
    case 109: histogram(p, shared, true, false); break;
    case 110:
      if (thread == 0) of_block(shared, (cluster_rank() + 1) % cluster_size())[0] = 1;  // 110
      cluster_barrier();
      break;
    case 111: count_together(p, shared, false); break;
    // meeting
    case 200:
      if (thread < 32) __syncthreads();  // 200
      else __syncthreads();              // 200
      break;
    case 201:
      if (lane < 16) __syncwarp();  // 201
      else __syncthreads();         // 201
      break;
    case 202:
      if (lane == 5) return;
      mma_16816<kF16>(c, r, 0, 0);  // 202
      break;
    case 203:
      if (lane < 16) ldmatrix4(r, shared);  // 203
      else ldmatrix4(r, shared);            // 203
      break;
    case 204: __shfl_sync(0xffffu, lane, 0); break;                          // 204
    case 205: if (lane < 16) __shfl_sync(0xffffu, lane, 20); break;          // 205
    case 206: if (lane != 9) __syncwarp(); else while (true) ld_acquire(p.flags); break;  // 206
    case 207:
      if (lane < 16) __shfl_sync(~0u, lane, 0);  // 207
      else __shfl_xor_sync(~0u, lane, 1);        // 207
      break;
    case 208:
      if (thread < 32) __syncthreads();           // 208
      else __syncthreads_or(1);                   // 208
      break;
    case 209:
      if (lane < 31) __syncwarp(0x7fffffff);
      if (lane == 31) __syncthreads();  // 209
      if (lane < 31) __syncwarp();      // 209
      break;
    case 210:
      if (thread < 32) cluster_barrier();  // 210
      else __syncthreads();                // 210
      break;
    case 211:
      if (lane < 16) __syncwarp();  // 211
      else cluster_barrier();       // 211
      break;
    case 212:
      if (cluster_rank() == 1 && thread == 63) __syncwarp();  // 212
      cluster_barrier();                                      // 212
      break;
    // addresses; those from 320 on of a cluster of two
    case 300: cp_async16(halves + 8 * thread + 8, p.global, true); break;                    // 300
    case 301: cp_async16(halves + 8 * thread + 4, p.global, true); break;                    // 301
    case 302: cp_async16(halves + 8 * thread, p.global + 8 * thread + 4, true); break;       // 302
    case 303: cp_async16(halves + 8 * thread, p.global + 8 * thread + 8, true); break;       // 303
    case 304: p.out[thread + 193] = 1.f; break;                                              // 304
    case 305: shared[thread * 4 + 4] = 1; break;                                             // 305
    case 306: *reinterpret_cast<float4*>(p.out + thread) = make_float4(0, 0, 0, 0); break;   // 306
    case 307: c[thread & 7] = 1.f, p.out[thread] = c[0] + c[3]; break;                       // 307
    case 308: ldmatrix4(r, halves + 8 * thread + 2); break;                                  // 308
    case 309: *reinterpret_cast<volatile int*>(p.flags[7]) = 1; break;                       // 309
    case 310: p.out[thread] = static_cast<float>(ld_stream16(p.global + 8 * thread + 8).x); break;  // 310
    case 311: atomicAdd(reinterpret_cast<float*>(p.flags) + thread, 1.f); break;             // 311
    case 312: p.out[thread] = static_cast<float>(1 << (p.flags[0] + 32 + thread)); break;    // 312
    case 313: p.out[thread] = static_cast<float>(thread / p.flags[0]); break;                // 313
    case 320: p.out[thread] = static_cast<float>(of_block(shared, 2)[thread]); break;  // 320
    case 321: p.out[thread] = *of_block(p.out, 1); break;                              // 321
    case 322:
      cluster_barrier();
      if (cluster_rank() == 0) of_block(shared, 1)[thread * 4 + 4] = 1;  // 322
      cluster_barrier();
      break;
    case 323:
      if (cluster_rank() == 1) return;
      cluster_barrier();
      of_block(shared, 1)[thread] = 1;  // 323
      break;
    case 324:
    case 325: {
      int* other = of_block(shared, 1);
      cluster_barrier();
      if (cluster_rank() == 1) return;
      cluster_barrier();
      if (p.plant == 324) p.flags[0] = other[thread];  // 324
      else atomicAdd(other + thread, 1);               // 325
      break;
    }
    case 326:
      of_block(shared, 1 - cluster_rank())[thread] = 1;  // 326
      cluster_barrier();
      break;
    case 327: {
      if (thread < 16) shared[thread] = 0;
      cluster_barrier();
      atomicAdd(reinterpret_cast<float*>(reinterpret_cast<char*>(of_block(shared, 1)) + 2), 1.f);  // 327
      cluster_barrier();
      break;
    }
    // launches that depend on the one before: no thread waits, one block does
    case 400: p.out[thread] = 1.f; break;
    case 401:
      if (blockIdx.x == 0) grid_dependency_wait();
      break;
    case 314: p.out[thread] = static_cast<float>(p.global[8 * thread + 8]); break;           // 314
  }
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_planted() { return static_cast<int>(sizeof(PlantedParams)); }
#endif
