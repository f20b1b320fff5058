// Lists of calls that run in one: what stands between two kernels is some nanoseconds.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

using Caller = int64_t (*)(const uint64_t*);

template <class T>
T argument(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <auto function, class Result, class... Arguments, size_t... I>
int64_t call(const uint64_t* words, Result (*)(Arguments...), std::index_sequence<I...>) {
  (void)words;
  if constexpr (std::is_void_v<Result>) {
    function(argument<Arguments>(words[I])...);
    return 0;
  } else {
    return int64_t(function(argument<Arguments>(words[I])...));
  }
}

template <auto function, class Result, class... Arguments>
constexpr size_t arity(Result (*)(Arguments...)) {
  return sizeof...(Arguments);
}

template <auto function>
int64_t caller(const uint64_t* words) {
  return call<function>(words, function, std::make_index_sequence<arity<function>(function)>{});
}

struct Named {
  const char* name;
  Caller run;
};

#define QB_CALLER(name) {#name, caller<name>}
constexpr Named CALLERS[] = {
    QB_CALLER(qb_layer),         QB_CALLER(qb_depthwise),     QB_CALLER(qb_winograd),      QB_CALLER(qb_transposed),
    QB_CALLER(qb_weight_only),   QB_CALLER(qb_lstm),          QB_CALLER(qb_dynamic_lstm),
    QB_CALLER(qb_weight_only_lstm), QB_CALLER(qb_attention),  QB_CALLER(qb_probabilities),
    QB_CALLER(qb_weighted_values), QB_CALLER(qb_layer_norm),  QB_CALLER(qb_quantize),
    QB_CALLER(qb_quantize_rows), QB_CALLER(qb_dequantize),    QB_CALLER(qb_add),
    QB_CALLER(qb_mul),           QB_CALLER(qb_table),         QB_CALLER(qb_average),
    QB_CALLER(qb_channel_affine), QB_CALLER(qb_rows),         QB_CALLER(qb_copy),
    QB_CALLER(qb_fill),          QB_CALLER(qb_max_pool),     QB_CALLER(qb_weight_only_transposed),
    QB_CALLER(qb_weight_only_depthwise), QB_CALLER(qb_dynamic_attention),
};

// Elements of one size from strides to strides, dimensions that lie in one piece joined.
template <int BYTES>
void copy_elements(const char* x, const int64_t* x_strides, char* y, const int64_t* y_strides, const int64_t* sizes,
                   int64_t dimensions) {
  if (!dimensions) {
    std::memcpy(y, x, BYTES);
    return;
  }
  if (dimensions == 1) {
    if (x_strides[0] == 1 && y_strides[0] == 1)
      std::memcpy(y, x, sizes[0] * BYTES);
    else
      for (int64_t i = 0; i < sizes[0]; ++i)
        std::memcpy(y + i * y_strides[0] * BYTES, x + i * x_strides[0] * BYTES, BYTES);
    return;
  }
  for (int64_t i = 0; i < sizes[0]; ++i)
    copy_elements<BYTES>(x + i * x_strides[0] * BYTES, x_strides + 1, y + i * y_strides[0] * BYTES, y_strides + 1, sizes + 1,
                         dimensions - 1);
}

}  // namespace

extern "C" {

void qb_copy(const void* x, const int64_t* x_strides, void* y, const int64_t* y_strides, const int64_t* sizes,
             int64_t dimensions, int64_t bytes) {
  std::vector<int64_t> from, to, size;
  for (int64_t d = 0; d < dimensions; ++d) {
    if (!sizes[d]) return;
    if (sizes[d] == 1) continue;
    const bool joins = !size.empty() && from.back() == x_strides[d] * sizes[d] && to.back() == y_strides[d] * sizes[d];
    if (joins) {
      size.back() *= sizes[d];
      from.back() = x_strides[d], to.back() = y_strides[d];
    } else {
      size.push_back(sizes[d]), from.push_back(x_strides[d]), to.push_back(y_strides[d]);
    }
  }
  // Planes of an image to channels last.
  const size_t d = size.size();
  if (bytes == 1 && (d == 2 || d == 3) && size[d - 1] <= 4 && to[d - 1] == 1 && to[d - 2] == size[d - 1] &&
      from[d - 2] == 1 && from[d - 1] == size[d - 2]) {
    const int64_t samples = d == 3 ? size[0] : 1;
    for (int64_t n = 0; n < samples; ++n)
      qb::kernels().interleave(static_cast<const uint8_t*>(x) + (d == 3 ? n * from[0] : 0), size[d - 1], size[d - 2],
                               static_cast<uint8_t*>(y) + (d == 3 ? n * to[0] : 0));
    return;
  }
  const auto copy = bytes == 1 ? copy_elements<1> : bytes == 4 ? copy_elements<4> : copy_elements<8>;
  const char* source = static_cast<const char*>(x);
  char* target = static_cast<char*>(y);
  const int64_t outer = size.empty() ? 1 : size[0], rest = std::max<int64_t>(0, int64_t(size.size()) - 1);
  int64_t all = bytes;
  for (const int64_t n : size) all *= n;
  const int threads = rest ? qb::threads_for(all, qb::WORTH_A_THREAD_BYTES) : 1;
  if (threads == 1) return copy(source, from.data(), target, to.data(), size.data(), int64_t(size.size()));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < outer; ++i)
    copy(source + i * from[0] * bytes, from.data() + 1, target + i * to[0] * bytes, to.data() + 1, size.data() + 1, rest);
}

void qb_fill(void* y, int64_t count, int32_t byte) { std::memset(y, byte, count); }

int32_t qb_rows(const void* table, int64_t rows, int64_t bytes, const int64_t* indices, int64_t count, void* y) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= rows) return -1;
    std::memcpy(static_cast<char*>(y) + i * bytes, static_cast<const char*>(table) + indices[i] * bytes, bytes);
  }
  return 0;
}

const void* qb_caller(const char* name) {
  for (const Named& one : CALLERS)
    if (!std::strcmp(one.name, name)) return reinterpret_cast<const void*>(one.run);
  return nullptr;
}

int64_t qb_run(const uint64_t* calls, int64_t count, int64_t* macs) {
  const qb::Watch watch;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t result = argument<Caller>(calls[0])(calls + 3);
    const int64_t counting = int64_t(calls[1]);
    if (watch.short_of_memory() || (counting == qb::FAILURE ? result != 0 : result < 0)) return i + 1;
    if (counting == qb::INT8_PRODUCTS || counting == qb::FLOAT32_PRODUCTS) macs[counting - 1] += result;
    calls += 3 + calls[2];
  }
  return 0;
}

int64_t qb_run_apart(const qb::Replay* replays, const uint64_t* starts, const int64_t* steps, int64_t* macs,
                     int64_t threads, int64_t slots, int64_t pieces) {
  const qb::Watch watch;
  int64_t failed = 0, int8 = 0, floats = 0;
  const int together = omp_in_parallel() ? 1 : int(std::min<int64_t>(threads, omp_get_max_threads()));
#pragma omp parallel num_threads(together) reduction(+ : int8, floats) reduction(max : failed) if (together > 1)
  {
    const qb::Replay& own = replays[together > 1 ? omp_get_thread_num() : 0];
    int64_t products[2] = {0, 0}, stopped = 0;
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < pieces; ++p) {
      if (stopped) continue;
      for (int64_t i = 0; i < slots; ++i) *own.slots[i] = starts[i] + uint64_t(p * steps[i]);
      stopped = qb_run(own.calls, own.count, products);
    }
    failed = stopped, int8 = products[0], floats = products[1];
  }
  macs[0] += int8, macs[1] += floats;
  return failed;
}
}
