// What tests/test_threads.py runs: exceptions of items, sizes that change under load, calls from several threads.
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../bindings/pool.h"

#define CHECK(x)                                     \
  if (!(x)) {                                        \
    std::printf("line %d: %s\n", __LINE__, #x);      \
    return 1;                                        \
  }

int main() {
  saap::set_num_threads(4);
  saap::Pool& pool = saap::pool();
  CHECK(saap::get_num_threads() == 4);
  for (int round = 0; round < 200; round++) {
    std::atomic<int> begun{0};
    std::string caught;
    try {
      pool.run(64, [&](int64_t i) {
        begun++;
        if (i % 7 == 3) throw std::out_of_range("item");
      });
    } catch (const std::out_of_range& error) {
      caught = error.what();
    }
    CHECK(caught == "item" && begun > 0 && begun <= 64);
    std::atomic<int> done{0};
    pool.run(64, [&](int64_t) { done++; });  // nothing of the failure is left
    CHECK(done == 64);
  }
  std::atomic<bool> stop{false};
  std::thread other([&] {
    for (int i = 0; !stop; i++) saap::set_num_threads(1 + i % 6), saap::suggest_num_threads(1 + i % 3);
  });
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int c = 0; c < 3; c++)
    callers.emplace_back([&] {
      for (int round = 0; round < 500; round++) {
        std::atomic<int64_t> sum{0};
        pool.run(50, [&](int64_t i) { sum += i; });
        if (sum != 50 * 49 / 2) wrong++;
      }
    });
  for (auto& t : callers) t.join();
  stop = true;
  other.join();
  CHECK(wrong == 0);
  saap::set_num_threads(0);
  saap::suggest_num_threads(3);
  CHECK(saap::get_num_threads() == 3);
  saap::set_num_threads(2);
  CHECK(saap::get_num_threads() == 2);
  std::puts("fine");
  return 0;
}
