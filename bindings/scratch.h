// Memory that a thread keeps between calls: grows, never shrinks, contents undefined. Declare it thread_local.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace saap {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(raw_); }

  // n elements of T, 64-byte aligned; invalidates what an earlier call returned.
  template <class T> T* get(size_t n) {
    size_t bytes = n * sizeof(T) + 128;
    if (bytes > bytes_) {
      std::free(raw_);
      bytes_ = 0;
      raw_ = std::malloc(bytes + bytes / 4);
      if (!raw_) throw std::bad_alloc();
      bytes_ = bytes + bytes / 4;
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(raw_) + 63) & ~uintptr_t(63));
  }

 private:
  void* raw_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace saap
