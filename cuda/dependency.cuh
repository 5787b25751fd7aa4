// Programmatic dependent launch: a launch that may begin before the one ahead of it is over.
#pragma once
#include "prims.cuh"

#ifdef SAAP_EMU
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}
#else
// Until the launch ahead is over and what it wrote can be seen. Nothing that it writes may be read before; every block waits.
SAAP_PRIM void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The launch behind may begin when all blocks have called this or are over. Only after the wait.
SAAP_PRIM void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif
