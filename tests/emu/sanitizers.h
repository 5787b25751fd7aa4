// What the sanitizers have to be told about fibers and about synchronisation that they cannot see. Empty in a plain build.
//
// ThreadSanitizer: every CUDA thread is a fiber of its own, switches order nothing, and only acquire / release below make one
// access happen before another. Memory touched under a Quiet is the emulator's own and is not looked at.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#define EMU_TSAN 1
#else
#define EMU_TSAN 0
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

#if EMU_TSAN
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if EMU_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* bytes);
void __asan_poison_memory_region(const volatile void* address, size_t bytes);
void __asan_unpoison_memory_region(const volatile void* address, size_t bytes);
}
#endif

// Reads the emulator's state on behalf of a CUDA thread: never inlined into instrumented code.
#if EMU_TSAN
#define EMU_UNSEEN inline __attribute__((noinline, no_sanitize("thread")))
#else
#define EMU_UNSEEN inline
#endif

namespace emu {

struct Quiet {
#if EMU_TSAN
  Quiet() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Quiet() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
  Quiet() {}
  ~Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

inline void acquire([[maybe_unused]] const void* token) {
#if EMU_TSAN
  __tsan_acquire(const_cast<void*>(token));
#endif
}

inline void release([[maybe_unused]] const void* token) {
#if EMU_TSAN
  __tsan_release(const_cast<void*>(token));
#endif
}

// GCC expands small copies without instrumenting them: an access of the kernel's that the emulator makes is declared.
inline void declare_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if EMU_TSAN
  __tsan_read_range(const_cast<void*>(p), bytes);
#endif
}

inline void declare_write([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if EMU_TSAN
  __tsan_write_range(p, bytes);
#endif
}

}  // namespace emu
