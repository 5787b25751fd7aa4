// Memory from the system, with a page behind and before it that nobody may touch.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <utility>

#include "sanitizers.h"

namespace emu {

class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(size_t bytes) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = (bytes + page - 1) / page * page;
    void* p = mmap(nullptr, bytes_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    base_ = static_cast<char*>(p), page_ = page;
    if (mprotect(base_ + page, bytes_, PROT_READ | PROT_WRITE)) abort();
#if EMU_ASAN
    // Reported by the sanitizer, with a line, before it becomes a fault.
    __asan_poison_memory_region(base_, page);
    __asan_poison_memory_region(end(), page);
#endif
  }
  Mapping(Mapping&& other) noexcept { *this = std::move(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(base_, other.base_), std::swap(bytes_, other.bytes_), std::swap(page_, other.page_);
    return *this;
  }
  ~Mapping() {
    if (!base_) return;
#if EMU_ASAN
    __asan_unpoison_memory_region(base_, bytes_ + 2 * page_);
#endif
    munmap(base_, bytes_ + 2 * page_);
  }

  void protect(bool closed) {
    if (mprotect(begin(), bytes_, closed ? PROT_NONE : PROT_READ | PROT_WRITE)) abort();
  }

  char* begin() const { return base_ + page_; }
  char* end() const { return begin() + bytes_; }
  size_t bytes() const { return bytes_; }
  // Whether p lies in one of the pages before and behind.
  bool guards(const char* p) const {
    return base_ && ((p >= base_ && p < begin()) || (p >= end() && p < end() + page_));
  }

 private:
  char* base_ = nullptr;
  size_t bytes_ = 0, page_ = 0;
};

}  // namespace emu
