// What the kernels share: rounding as the specification has it, scratch, and when a second thread pays.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "engine.h"

namespace qb {

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // multiply-accumulates: starting a second thread costs some microseconds
constexpr int64_t WORTH_A_THREAD_BYTES = 1 << 15;

inline int threads_for(int64_t work, int64_t worth) {
  return work < 2 * worth || omp_in_parallel() ? 1 : omp_get_max_threads();
}

inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Memory of one thread that grows and is used again.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <class T>
  T* of(int64_t count) {
    const int64_t bytes = rounded_up(std::max<int64_t>(count, 1) * int64_t(sizeof(T)), 64);
    if (bytes > size_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, bytes);
      size_ = memory_ ? bytes : 0;
      if (!memory_) std::abort();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Integers to round to, half to even: adding 1.5 * 2^23 leaves no bits behind the point.
constexpr float ROUNDER = 12582912.0f;
constexpr int32_t ROUNDER_BITS = 0x4B400000;

inline int32_t bits_of(float v) { return __builtin_bit_cast(int32_t, v); }
inline float float_of(int32_t bits) { return __builtin_bit_cast(float, bits); }

// R without its zero point: v rounded half to even and clamped; NaN gives the lower bound. |bounds| < 2^22.
inline int32_t rounded(float v, float low, float high) {
  v = v > low ? v : low;
  v = v < high ? v : high;
  return bits_of(v + ROUNDER) - ROUNDER_BITS;
}

}  // namespace qb
