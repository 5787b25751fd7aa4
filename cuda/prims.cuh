// Every instruction that CUDA C++ cannot express, each once for the GPU (inline PTX) and once for the CPU, so that a kernel
// is one source for NVRTC and for the emulation layer of tests/emu. No header of CUDA is needed, and none may be included.
//
// With SAAP_EMU defined (g++, C++20) everything comes from emulator.h: what CUDA itself provides, and the same primitives with
// checks. Without it the bodies below are compiled for sm_80 and newer by NVRTC or nvcc, C++17.
//
// A lane of a warp is threadIdx.x % 32. Fragments of the matrix instructions, of lane 4 * g + t, in the order of the registers
// (each of two 16-bit elements, the lower column or row in the low half):
//   8 x 8 matrix of ldmatrix / movmatrix   row g, columns 2t, 2t + 1
//   a (16 x 16)  (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)
//   b (16 x 8)   rows 2t, 2t + 1 of column g; rows 2t + 8, 2t + 9 of column g
//   c (16 x 8)   float: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// Storage types; the numbers of bindings/dtypes.h.
constexpr int kF32 = 0, kBF16 = 1, kF16 = 2;

#ifdef SAAP_EMU
#include "emulator.h"
#else

#define SAAP_PRIM __device__ __forceinline__

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

// T* name: the start of the block's dynamic shared memory, aligned to 128 bytes. There is no other shared memory.
#define SAAP_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char saap_shared_bytes[]; \
  T* const name = reinterpret_cast<T*>(saap_shared_bytes)

// ---- conversions

// Exact.
template <int T>
SAAP_PRIM float widen(u16 bits) {
  static_assert(T == kBF16 || T == kF16, "a 16-bit type");
  if constexpr (T == kBF16) {
    return __uint_as_float(static_cast<u32>(bits) << 16);
  } else {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
}

// To nearest, ties to even; beyond the largest fp16 infinity; NaN becomes 0x7fff.
template <int T>
SAAP_PRIM u16 narrow(float x) {
  static_assert(T == kBF16 || T == kF16, "a 16-bit type");
  u16 bits;
  if constexpr (T == kBF16) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  return bits;
}

template <int T>
SAAP_PRIM u32 narrow2(float lo, float hi) {
  static_assert(T == kBF16 || T == kF16, "a 16-bit type");
  u32 bits;
  if constexpr (T == kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  }
  return bits;
}

// ---- arithmetic

// 2^x within 2 units in the last place; subnormal results are 0, 2^-inf = 0.
SAAP_PRIM float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), absolute error 2^-22 near 1 and relative 2^-22 elsewhere; 0 and subnormals give -inf.
SAAP_PRIM float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sine and cosine of pi * x for any finite x: reduced in double, where the reduction is exact; no local memory.
SAAP_PRIM void sinpi_cospi(double x, float* sine, float* cosine) {
  sincospif(static_cast<float>(x - 2.0 * rint(0.5 * x)), sine, cosine);
}

// a - b of two fp16 each, to nearest, ties to even.
SAAP_PRIM u32 sub_f16x2(u32 a, u32 b) {
  u32 c;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

// ---- memory

SAAP_PRIM u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes to shared memory, past L1; zeros if !valid, and then `global` is not read. Both aligned to 16.
SAAP_PRIM void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same of 4 bytes, aligned to 4.
SAAP_PRIM void cp_async4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// Closes the group of the copies that this thread started since the last one.
SAAP_PRIM void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the latest N groups of this thread are complete. Other threads see the bytes after a barrier that follows.
template <int N>
SAAP_PRIM void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 16 aligned bytes of device memory that are read once: no line of L1 is given to them.
SAAP_PRIM uint4 ld_stream16(const void* global) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global)
               : "memory");
  return v;
}

// What other blocks of the same launch may have written: from L2, past the L1 of this multiprocessor. Aligned to their size.
SAAP_PRIM float4 ld_l2_16(const void* global) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(global)
               : "memory");
  return v;
}

SAAP_PRIM float2 ld_l2_8(const void* global) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(global) : "memory");
  return v;
}

SAAP_PRIM int ld_acquire(const int* global) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
  return v;
}

SAAP_PRIM void st_release(int* global, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(global), "r"(v) : "memory");
}

// Counts one up and from `most` to zero; returns the number before. What this thread has written and seen is seen by whoever
// counts after it.
SAAP_PRIM u32 atomic_inc_acq_rel(u32* global, u32 most) {
  u32 v;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(v) : "l"(global), "r"(most) : "memory");
  return v;
}

// ---- clusters of blocks
//
// Blocks of a cluster (the launch says how many, neighbours in x) run at the same time and reach each other's shared memory: after
// a cluster_barrier at the beginning, before which another block may not have started, and with one at the end, since no block may
// return while others still use its memory. Below sm_90 a block is a cluster of its own.

// Number of the block in its cluster, in [0, cluster_size()): blockIdx.x % cluster_size().
SAAP_PRIM int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// Blocks of the cluster.
SAAP_PRIM int cluster_size() {
#if __CUDA_ARCH__ >= 900
  u32 size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

// Every thread of every block of the cluster that has not returned; what they did before, in shared and in device memory, is seen
// after it. All lanes of a warp come together.
SAAP_PRIM void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same object in the dynamic shared memory of block `rank` of the cluster, for plain loads, stores and atomics (not for copies
// and matrix instructions). `shared` lies in the block's own.
template <class T>
SAAP_PRIM T* of_block(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  T* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(shared), "r"(rank));
  return other;
#else
  return shared;
#endif
}

// ---- launches that overlap
//
// Blocks of a dependent launch may start before the kernel in front of it on the stream has ended: once each of its blocks has called
// grid_dependency_launch or returned. Nothing that an earlier kernel writes may be read, and nothing that it reads written, before
// grid_dependency_wait, after which all earlier kernels have ended and what they wrote is seen. At least one thread of each block
// waits; a barrier hands it on to the others. Both do nothing in other launches, and below sm_90.

SAAP_PRIM void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A hint, which promises nothing of what this kernel has written or will write.
SAAP_PRIM void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- matrices; all 32 lanes take part

// Four 8 x 8 matrices: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes each, aligned to 16.
SAAP_PRIM void ldmatrix4(u32 (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// The same, each matrix transposed.
SAAP_PRIM void ldmatrix4_trans(u32 (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// One 8 x 8 matrix in registers, transposed.
SAAP_PRIM u32 movmatrix_trans(u32 a) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// c += a b.
template <int T>
SAAP_PRIM void mma_16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static_assert(T == kBF16 || T == kF16, "a 16-bit type");
  if constexpr (T == kBF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#endif  // SAAP_EMU

// ---- in terms of those above

// Bytes of an element of dtype T, and the plain type it is stored as.
template <int T>
struct element {
  using type = u16;
};
template <>
struct element<kF32> {
  using type = float;
};
template <int T>
using element_t = typename element<T>::type;

SAAP_PRIM float widen(float x) { return x; }

template <int T>
SAAP_PRIM float widen(float x) {
  static_assert(T == kF32, "bits of a 16-bit type are u16");
  return x;
}

// Element `index` of an array of dtype T.
template <int T>
SAAP_PRIM float load(const void* base, i64 index) {
  return widen<T>(static_cast<const element_t<T>*>(base)[index]);
}

template <int T>
SAAP_PRIM void store(void* base, i64 index, float x) {
  if constexpr (T == kF32) {
    static_cast<float*>(base)[index] = x;
  } else {
    static_cast<u16*>(base)[index] = narrow<T>(x);
  }
}
