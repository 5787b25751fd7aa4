// The online softmax as one small mergeable value, for host and device alike.
//
// A state stands for a set of tokens: o the weighted sum of their values, m the largest of their logits, l the sum of their
// weights 2^(logit - m), logits in log2 units (natural ones times log2 e). States over disjoint sets merge into the state of
// the union: an associative, commutative monoid up to rounding, whose identity is the empty state (o = 0, m = -inf, l = 0).
// An empty state normalises to out = 0 and lse = -inf; no operation on finite or empty states gives NaN. A state that met NaN
// (l is NaN) makes NaN of every state that it joins, and of its own out and lse.
//
// Define SAAP_HD before inclusion to override how the functions are declared.
#pragma once
#ifndef __CUDACC_RTC__
#include <cmath>
#endif

#ifndef SAAP_HD
#ifdef __CUDACC__
#define SAAP_HD __host__ __device__ __forceinline__
#else
#define SAAP_HD inline
#endif
#endif

namespace saap {

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2e = 1.44269504088896341f;

// The scalar half of a state, for callers that keep the values elsewhere (spread over lanes, or in strides).
struct softmax_mass {
  float m, l;

  static SAAP_HD softmax_mass empty() { return {-INFINITY, 0.f}; }
  // One token of this logit.
  static SAAP_HD softmax_mass of(float logit) { return {logit, 1.f}; }
  // From a natural-log lse, as the public functions return it: normalised values have weight 1 under it.
  static SAAP_HD softmax_mass from_lse(float lse) { return lse == -INFINITY ? empty() : softmax_mass{lse * kLog2e, 1.f}; }

  SAAP_HD bool is_empty() const { return l == 0.f; }
  SAAP_HD float lse() const { return is_empty() ? -INFINITY : (m + log2f(l)) * kLn2; }
  // What a value sum is multiplied by to become the attention output.
  SAAP_HD float inverse() const { return is_empty() ? 0.f : 1.f / l; }

  // Becomes the union with b. The value sums of the two sides are to be multiplied by keep and take.
  SAAP_HD void join(softmax_mass b, float& keep, float& take) {
    if (b.is_empty()) {
      keep = 1.f, take = 0.f;
    } else if (is_empty()) {
      keep = 0.f, take = 1.f;
      *this = b;
    } else {
      float top = m > b.m ? m : b.m;
      keep = exp2f(m - top), take = exp2f(b.m - top);
      m = top;
      l = l * keep + b.l * take;
    }
  }
};

// A state with n value dims at hand.
template <int n>
struct softmax_state {
  float o[n];
  softmax_mass mass;

  SAAP_HD void init() {
    for (int i = 0; i < n; i++) o[i] = 0.f;
    mass = softmax_mass::empty();
  }
  // Adds one token.
  SAAP_HD void update(float logit, const float* value) {
    float keep, take;
    mass.join(softmax_mass::of(logit), keep, take);
    for (int i = 0; i < n; i++) o[i] = o[i] * keep + value[i] * take;
  }
  SAAP_HD void merge(const softmax_state& b) {
    float keep, take;
    mass.join(b.mass, keep, take);
    for (int i = 0; i < n; i++) o[i] = o[i] * keep + b.o[i] * take;
  }
  // out (n) = the attention output; returns its natural-log lse.
  SAAP_HD float normalise(float* out) const {
    float inverse = mass.inverse();
    for (int i = 0; i < n; i++) out[i] = o[i] * inverse;
    return mass.lse();
  }
};

}  // namespace saap
