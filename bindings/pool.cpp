// The worker pool of pool.h. Knows nothing of what it runs.
#include "pool.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace saap {
namespace {

// After the last operation of a decode step the core is left to others at once. Between its operations lie some fifty microseconds
// of the caller's Python, and to wake a thread that sleeps may cost as much again: there workers stay awake, though not for ever.
constexpr int kSpins = 400;
constexpr auto kSoon = std::chrono::microseconds(150);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<Pool*> current{nullptr};
std::mutex starting;
int wanted = 0, suggested = 0;  // 0: not asked for

// With `starting` held.
int target_threads() {
  if (wanted) return wanted;
  if (const char* text = std::getenv("SAAP_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n > 0) return n;
  }
  if (suggested) return suggested;
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

#if !defined(_WIN32)
// The parent's pool object describes threads that do not exist here: it is abandoned, not destroyed.
void forget_after_fork() {
  current.store(nullptr);
  new (&starting) std::mutex;
}
#endif

}  // namespace

void Pool::resize(int threads) {
  std::lock_guard<std::mutex> lock(growing_);
  for (int number = started_.load() + 1; number < threads; number++) {
    try {
      std::thread([this, number] { work(number); }).detach();
    } catch (const std::system_error&) {  // a limit of processes or of memory: go on with those there are
      break;
    }
    started_.store(number);
  }
  limit_.store(threads > 1 ? threads : 1);
  limit_.notify_all();
}

int Pool::threads() const { return std::min(limit_.load(std::memory_order_relaxed), started_.load(std::memory_order_relaxed) + 1); }

void Pool::drain() {
  uint64_t s = open_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(s)) {
    if (!open_.compare_exchange_weak(s, s - 1, std::memory_order_acquire)) continue;
    // Taken: the job cannot end, nor fn_ change, before unfinished_ falls.
    if (!failed_.load(std::memory_order_relaxed)) {
      try {
        fn_(arg_, count_ - static_cast<uint32_t>(s));
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
    unfinished_.fetch_sub(1, std::memory_order_release);
    s = open_.load(std::memory_order_acquire);
  }
}

void Pool::work(int number) {
  uint32_t seen = 0;
  for (;;) {
    for (int limit; number >= (limit = limit_.load(std::memory_order_acquire));) limit_.wait(limit, std::memory_order_acquire);
    const auto same = [&] { return job_.load(std::memory_order_acquire) == seen; };
    for (int k = 0; k < kSpins && same(); k++) relax();
    if (next_.load(std::memory_order_relaxed) == Next::kSoon) {
      const auto until = std::chrono::steady_clock::now() + kSoon;
      while (same() && std::chrono::steady_clock::now() < until) relax();
    }
    job_.wait(seen, std::memory_order_acquire);
    seen = job_.load(std::memory_order_acquire);
    if (number < limit_.load(std::memory_order_relaxed)) drain();
  }
}

void Pool::run_erased(int64_t n, Erased fn, void* arg) {
  if (n <= 0) return;
  if (n == 1 || threads() == 1 || n > UINT32_MAX || busy_.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < n; i++) fn(arg, i);
    return;
  }
  fn_ = fn;
  arg_ = arg;
  count_ = n;
  unfinished_.store(static_cast<uint32_t>(n), std::memory_order_relaxed);
  uint32_t number = job_.load(std::memory_order_relaxed) + 1;
  open_.store(static_cast<uint64_t>(number) << 32 | static_cast<uint32_t>(n), std::memory_order_release);
  job_.store(number, std::memory_order_release);
  job_.notify_all();
  drain();
  for (int k = 0; unfinished_.load(std::memory_order_acquire); k++) {
    if (k < 4096) relax();
    else std::this_thread::yield();
  }
  std::exception_ptr error;
  if (failed_.load()) {
    error = std::exchange(error_, nullptr);
    failed_.store(false);
  }
  busy_.store(false, std::memory_order_release);
  if (error) std::rethrow_exception(error);
}

Pool& pool() {
  if (Pool* p = current.load(std::memory_order_acquire)) return *p;
  std::lock_guard<std::mutex> lock(starting);
  if (Pool* p = current.load(std::memory_order_acquire)) return *p;
#if !defined(_WIN32)
  static bool registered = (pthread_atfork(nullptr, nullptr, forget_after_fork), true);
  (void)registered;
#endif
  Pool* p = new Pool;
  p->resize(target_threads());
  current.store(p, std::memory_order_release);
  return *p;
}

void set_num_threads(int threads) {
  std::lock_guard<std::mutex> lock(starting);
  wanted = threads > 0 ? threads : 0;
  if (Pool* p = current.load()) p->resize(target_threads());
}

void suggest_num_threads(int threads) {
  std::lock_guard<std::mutex> lock(starting);
  suggested = threads > 0 ? threads : 0;
  if (Pool* p = current.load()) p->resize(target_threads());
}

int get_num_threads() { return pool().threads(); }

}  // namespace saap
