// A small worker pool: run(n, f) calls f(i) once for every i in [0, n), on the caller and on the workers.
//
// The caller waits for items, never for workers: a worker that the system has not scheduled costs nothing, so a loaded machine
// slows a call down by what it lacks in cores and no more, and one that the system does not start is not missed. A call made while
// another one runs (from a second thread, or from inside an item) does all of its items itself. Which thread computes an item is
// unspecified; results must not depend on it. If an item throws, items that have not begun are left out, and `run` throws it.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <type_traits>

namespace saap {

class Pool {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // How many threads take part in the calls that follow, the caller one of them, or as many as the system starts. At any time.
  void resize(int threads);
  int threads() const;

  // next : whether the caller is about to bring more work (workers wait for it awake), or not.
  enum class Next { kLater, kSoon };

  template <class F>
  void run(int64_t n, F&& f, Next next = Next::kLater) {
    using Fn = std::remove_reference_t<F>;
    next_.store(next, std::memory_order_relaxed);
    run_erased(n, [](void* arg, int64_t i) { (*static_cast<Fn*>(arg))(i); }, const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  using Erased = void (*)(void*, int64_t);
  void run_erased(int64_t n, Erased fn, void* arg);
  void drain();
  void work(int number);

  // Job number in the upper half, items nobody has taken in the lower: one word, so that a late worker cannot take from a job
  // other than the one whose function it will read.
  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<uint32_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> job_{0};  // what sleeping workers wait on
  std::atomic<int> limit_{1};                 // workers from this number on sleep until it grows
  std::atomic<int> started_{0};
  std::atomic<bool> busy_{false};
  std::atomic<bool> failed_{false};
  std::atomic<Next> next_{Next::kLater};
  std::mutex growing_;
  std::exception_ptr error_;
  Erased fn_ = nullptr;
  void* arg_ = nullptr;
  int64_t count_ = 0;
};

// The pool of this process, started on first use and never stopped. A forked child, which inherits no thread, starts one of its own.
// Its size: what set_num_threads asked for, else SAAP_NUM_THREADS, else what suggest_num_threads said, else the hardware's threads.
Pool& pool();
void set_num_threads(int threads);      // 0: no longer asked for
void suggest_num_threads(int threads);
int get_num_threads();

}  // namespace saap
