// What the kernels share: rounding as the specification has it, scratch, and when a second thread pays.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#include "engine.h"

namespace qb {

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // multiply-accumulates: starting a second thread costs some microseconds
constexpr int64_t WORTH_A_THREAD_BYTES = 1 << 15;

inline int threads_for(int64_t work, int64_t worth) {
  return work < 2 * worth || omp_in_parallel() ? 1 : omp_get_max_threads();
}

inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// How often memory ran out so far, on any thread: one that works for a call need not know for which.
inline std::atomic<int64_t> shortages{0};

// Lives as long as a C function runs; at its end errno is ENOMEM where memory ran out meanwhile, else 0. It may have run
// out for another thread's call: then both fail, which is better than a wrong result.
class Watch {
 public:
  ~Watch() { errno = short_of_memory() ? ENOMEM : 0; }
  bool short_of_memory() const { return shortages != before_; }

 private:
  const int64_t before_ = shortages;
};

// Memory of one thread that grows and is used again. Where there is none left it is null and a shortage is noted: whoever
// asked leaves its part of the result undone. An exception could not leave the parallel region.
class Scratch {
 public:
  ~Scratch() { release(); }
  template <class T>
  T* of(int64_t count) {
    const int64_t bytes = rounded_up(std::max<int64_t>(count, 1) * int64_t(sizeof(T)), 64);
    if (bytes > size_) {
      release();
      memory_ = ::operator new(bytes, ALIGNMENT, std::nothrow);
      size_ = memory_ ? bytes : 0;
      if (!memory_) ++shortages;
    }
    return static_cast<T*>(memory_);
  }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};

  void release() { ::operator delete(memory_, ALIGNMENT); }

  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Integers to round to, half to even: adding 1.5 * 2^23 leaves no bits behind the point.
constexpr float ROUNDER = 12582912.0f;
constexpr int32_t ROUNDER_BITS = 0x4B400000;

}  // namespace qb
