// What the kernels that evaluate a router share: the unit of packed weights, and the arithmetic of a hidden unit.
#pragma once
#include "prims.cuh"

namespace {

constexpr int kUnit = 1024;  // bytes: two fragments of 16 x 16 weights

// Into the range of fp16; NaN stays.
__device__ __forceinline__ float clamp_f16(float x) {
  constexpr float kMostF16 = 65504.f;
  return x > kMostF16 ? kMostF16 : x < -kMostF16 ? -kMostF16 : x;
}

// A division would be a call and its own registers; this is far more exact than the fp16 that the result becomes.
__device__ __forceinline__ float silu(float x) { return x * exp2_fast(-log2_fast(1.f + exp2_fast(-1.44269504f * x))); }

}  // namespace
