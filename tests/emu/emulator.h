// What prims.cuh includes for the CPU: see README.md. Everything that a kernel may name, and nothing of the standard library.
#pragma once
#include "builtins.h"
#include "collective.h"
#include "matrix.h"
#include "memory.h"

#define SAAP_PRIM inline
#define SAAP_SHARED(T, name) T* const name = reinterpret_cast<T*>(emu::shared_memory())

// Results that the hardware flushes to zero are flushed.
inline float exp2_fast(float x) {
  float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float log2_fast(float x) { return log2f(fabsf(x) < 0x1p-126f ? 0.f : x); }

inline void sinpi_cospi(double x, float* sine, float* cosine) {
  sincospif(static_cast<float>(x - 2. * rint(.5 * x)), sine, cosine);
}

namespace emu {

// The parameter struct of a kernel, from its bytes.
template <class P, class Q = std::remove_const_t<P>>
void invoke(void (*kernel)(P), const void* params) {
  static_assert(std::is_trivially_copyable_v<Q>);
  kernel(*static_cast<const Q*>(params));
}
template <class P>
constexpr int params_bytes(void (*)(P)) {
  return sizeof(P);
}

}  // namespace emu

// Exports a kernel for runtime.py.
#define EMU_EXPORT(kernel)                                                                  \
  extern "C" void emu_invoke(const void* params) { emu::invoke(kernel, params); }           \
  extern "C" int emu_params_bytes() { return emu::params_bytes(kernel); }
