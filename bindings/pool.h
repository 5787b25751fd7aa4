// A small worker pool: run(n, f) calls f(i) once for every i in [0, n), on the caller and on the workers.
//
// The caller waits for items, never for workers: a worker that the system has not scheduled costs nothing, so a loaded machine
// slows a call down by what it lacks in cores and no more. A call made while another one runs (from a second thread, or from
// inside an item) does all of its items itself. Which thread computes an item is unspecified; results must not depend on it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace saap {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

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
  void work();

  std::vector<std::thread> workers_;
  // Job number in the upper half, items nobody has taken in the lower: one word, so that a late worker cannot take from a job
  // other than the one whose function it will read.
  alignas(64) std::atomic<uint64_t> open_{0};
  alignas(64) std::atomic<uint32_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> job_{0};  // what sleeping workers wait on
  std::atomic<bool> stop_{false};
  std::atomic<bool> busy_{false};
  std::atomic<Next> next_{Next::kLater};
  Erased fn_ = nullptr;
  void* arg_ = nullptr;
  int64_t count_ = 0;
};

// The pool of this process, started on first use: SAAP_NUM_THREADS threads, or as many as the hardware has. A forked child,
// which inherits no thread, starts one of its own.
Pool& pool();
void set_num_threads(int threads);
int get_num_threads();

}  // namespace saap
