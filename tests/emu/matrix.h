// The matrix instructions of a warp, on the fragments that prims.cuh describes.
#pragma once
#include "half.h"

namespace emu {

void ldmatrix(u32 (&r)[4], const void* row, bool transposed, Site at);
u32 movmatrix(u32 a, Site at);
// T: kBF16 or kF16.
template <int T>
void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Site at);

}  // namespace emu

inline void ldmatrix4(u32 (&r)[4], const void* shared_row, EMU_HERE) { emu::ldmatrix(r, shared_row, false, at); }
inline void ldmatrix4_trans(u32 (&r)[4], const void* shared_row, EMU_HERE) { emu::ldmatrix(r, shared_row, true, at); }
inline u32 movmatrix_trans(u32 a, EMU_HERE) { return emu::movmatrix(a, at); }

template <int T>
void mma_16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, EMU_HERE) {
  static_assert(T == kBF16 || T == kF16, "a 16-bit type");
  emu::mma<T>(c, a, b0, b1, at);
}
