// Which rows of the arena an operation reads, in which order.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace saap {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The rows of one (sequence, KV head) in reading order: sinks, the first of which is row `first`, listed, recent.
struct Source {
  int64_t sinks, listed, recent_from, recent;
  const int32_t* list;
  int64_t first = 0;
  int64_t total() const { return sinks + listed + recent; }

  // Row numbers of places [from, from + n), then kScanPad repeats of the last. False if one lies outside [0, N).
  bool read(int64_t from, int n, int64_t N, int32_t* rows) const {
    int64_t at = from, end = from + n;
    int32_t* out = rows;
    for (; at < end && at < sinks; at++) *out++ = static_cast<int32_t>(first + at);
    int64_t stop = std::min(end, sinks + listed);
    bool fine = true;
    for (; at < stop; at++) {
      int32_t r = list[at - sinks];
      fine &= static_cast<uint32_t>(r) < static_cast<uint64_t>(N);
      *out++ = r;
    }
    for (int64_t r = recent_from + at - sinks - listed; at < end; at++, r++) *out++ = static_cast<int32_t>(r);
    for (int i = 0; i < kScanPad; i++) rows[n + i] = rows[n - 1];
    return fine;
  }
};

}  // namespace saap
