// Merges two attention states over disjoint tokens, row by row: the monoid of softmax_state.cuh.
//
// One thread per element, in any number of blocks of kCombineThreads; no shared memory. A side of weight zero is not read: it
// may hold anything. Inputs and outputs do not overlap. Deterministic. Macro: SAAP_T, the dtype of out.
#include "prims.cuh"
#include "softmax_state.cuh"

struct CombineParams {
  const void* out_a;   // dtype T (n, e)
  const float* lse_a;  // float32 (n,)
  const void* out_b;   // dtype T (n, e)
  const float* lse_b;  // float32 (n,)
  void* out;           // dtype T (n, e)
  float* lse;          // float32 (n,)
  i64 n;
  int e;
};

constexpr int kCombineThreads = 256;

extern "C" __global__ void __launch_bounds__(kCombineThreads) saap_combine(const __grid_constant__ CombineParams p) {
  const i64 step = static_cast<i64>(gridDim.x) * kCombineThreads;
  for (i64 i = static_cast<i64>(blockIdx.x) * kCombineThreads + threadIdx.x; i < p.n * p.e; i += step) {
    const i64 row = i / p.e;
    saap::softmax_mass mass = saap::softmax_mass::from_lse(p.lse_a[row]);
    float keep, take;
    mass.join(saap::softmax_mass::from_lse(p.lse_b[row]), keep, take);
    const float inverse = mass.inverse();
    keep *= inverse, take *= inverse;
    const float a = keep != 0.f ? load<SAAP_T>(p.out_a, i) * keep : 0.f;
    const float b = take != 0.f ? load<SAAP_T>(p.out_b, i) * take : 0.f;
    store<SAAP_T>(p.out, i, a + b);
    if (i == row * p.e) p.lse[row] = mass.lse();
  }
}

#ifdef SAAP_EMU
extern "C" int saap_sizeof_combine() { return static_cast<int>(sizeof(CombineParams)); }
#endif
