// The functions that exist once for each instruction set. dispatch.cpp picks a table when the library is loaded.
#pragma once

#include "common.h"

namespace qb {

struct Codes {  // of a result: R(v)
  float low, high;
  int32_t zero_point;
  Codes(int32_t zero, int32_t q_min, int32_t q_max)
      : low(float(q_min - zero)), high(float(q_max - zero)), zero_point(zero) {}
};

struct Kernels {
  const char* name;
  int64_t (*peak)(int64_t);
  int64_t (*packed_size)(int64_t, int64_t, int64_t, int64_t, int64_t);
  void (*pack)(const int8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int8_t*, int32_t*);
  int64_t (*layer)(const Weight&, const Finish&, const Window&, const Rows&, const Operands&);
  int64_t (*packed_depthwise_size)(int64_t, int64_t, int64_t);
  void (*pack_depthwise)(const int8_t*, const int32_t*, int64_t, int64_t, int64_t, int8_t*, int32_t*);
  int64_t (*depthwise)(const Weight&, const Finish&, const Window&, const Rows&, const Operands&);
  bool (*winograd_pays)(int64_t, const Window&);
  int64_t (*packed_winograd_size)(int64_t, int64_t);
  void (*pack_winograd)(const int8_t*, const int32_t*, int64_t, int64_t, int8_t*, int32_t*);
  int64_t (*winograd)(const Weight&, const Finish&, const Window&, const Rows&, const Operands&);
  int64_t (*transposed)(const Weight*, const Finish&, const Window*, const Rows&, const Operands&, int64_t, int64_t);
  int64_t (*weight_only)(const Weight&, const float*, const Finish&, const Window&, const Operands&);
  int64_t (*weight_only_transposed)(const Weight*, const float*, const Finish&, const Window*, const Operands&, int64_t,
                                    int64_t);
  int64_t (*weight_only_depthwise)(const int8_t*, const int32_t*, const float*, const float*, const Window&,
                                   const Operands&);
  int64_t (*lstm)(const Recurrent&, const uint8_t*, const uint8_t*, float*, uint8_t*);
  int64_t (*dynamic_lstm)(const Recurrent&, const uint8_t*, const float*, const int32_t*, const float*, float*, float*);
  int64_t (*weight_only_lstm)(const Recurrent&, const float*, const float*, const float*, const float*, float*, float*);
  int64_t (*attention)(const Attention&, const uint8_t*, const uint8_t*, const uint8_t*, uint8_t*);
  int64_t (*dynamic_attention)(const Attention&, const Quantized&, const Quantized&, const Quantized&, bool, bool, float*);
  int64_t (*probabilities)(const Attention&, const Quantized&, const Quantized&, float*);
  int64_t (*weighted_values)(const Attention&, const Quantized&, const Quantized&, float*);
  void (*layer_norm)(const uint8_t*, int64_t, int64_t, int32_t, double, double, const float*, const float*, Codes,
                     uint8_t*);
  void (*quantize)(const float*, int64_t, float, Codes, uint8_t*);
  int32_t (*quantize_rows)(const float*, int64_t, int64_t, bool, uint8_t*, float*, int32_t*);
  void (*dequantize)(const uint8_t*, int64_t, float, int32_t, float*);
  void (*add)(const uint8_t*, const uint8_t*, int64_t, int32_t, float, int32_t, float, Codes, uint8_t*);
  void (*mul)(const uint8_t*, const uint8_t*, int64_t, int32_t, int32_t, float, Codes, uint8_t*);
  void (*look_up)(const uint8_t*, int64_t, const uint8_t*, uint8_t*);
  void (*average)(const uint8_t*, const Averaging&, int64_t, Codes, uint8_t*);
  void (*channel_affine)(const uint8_t*, int64_t, int64_t, int32_t, const float*, const float*, Codes, uint8_t*);
  void (*max_pool)(const uint8_t*, const Window&, int64_t, uint8_t*);
  void (*interleave)(const uint8_t*, int64_t, int64_t, uint8_t*);
};

const Kernels& kernels();  // those of the instruction set that runs

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx_vnni, avx512_vnni, amx;
#endif

}  // namespace qb
