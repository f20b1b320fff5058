// The C functions: each hands over to the kernels of the instruction set that runs here.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "kernels.h"

#ifndef QB_SOURCES
#define QB_SOURCES ""
#endif

namespace {

using namespace qb;

#if defined(__x86_64__)
bool has_avx_vnni() {  // g++ 12 has no name for it
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// Tile registers, and Linux' leave to use them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
  return false;
#endif
}
#endif

// The best that this CPU has; QBENCH_ISA names one that is to run instead; where it cannot, `portable`
// runs, and the loader (library.py) raises.
const Kernels& chosen() {
  const char* forced = std::getenv("QBENCH_ISA");
  const auto may = [forced](const Kernels& k) { return !forced || !*forced || !std::strcmp(forced, k.name); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_vnni = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (has_vnni && may(amx) && has_amx()) return amx;
  if (has_vnni && may(avx512_vnni)) return avx512_vnni;
  if (has_avx2 && has_avx_vnni() && may(avx_vnni)) return avx_vnni;
  if (has_avx2 && may(avx2)) return avx2;
#endif
  (void)may;
  return portable;
}

// The kernels, for the length of one C function.
struct Call {
  Watch watch;
  const Kernels* operator->() const { return &kernels(); }
};

}  // namespace

const qb::Kernels& qb::kernels() {
  static const Kernels& table = chosen();
  return table;
}

extern "C" {

const char* qb_sources() { return QB_SOURCES; }
const char* qb_isa() { return Call()->name; }

int64_t qb_peak(int64_t rounds) { return Call()->peak(rounds); }

int64_t qb_packed_size(int64_t groups, int64_t outputs, int64_t depth, int64_t block_depth, int64_t segment) {
  return Call()->packed_size(groups, outputs, depth, block_depth, segment);
}

void qb_pack(const int8_t* weight, int64_t groups, int64_t outputs, int64_t depth, int64_t block_depth, int64_t segment,
             int8_t* packed, int32_t* totals) {
  Call()->pack(weight, groups, outputs, depth, block_depth, segment, packed, totals);
}

int64_t qb_layer(const Weight* weight, const Finish* finish, const Window* window, const Rows* rows,
                 const Operands* operands) {
  return Call()->layer(*weight, *finish, *window, *rows, *operands);
}

int64_t qb_packed_depthwise_size(int64_t channels, int64_t height, int64_t width) {
  return Call()->packed_depthwise_size(channels, height, width);
}

void qb_pack_depthwise(const int8_t* weight, const int32_t* zero_points, int64_t channels, int64_t height, int64_t width,
                       int8_t* packed, int32_t* totals) {
  Call()->pack_depthwise(weight, zero_points, channels, height, width, packed, totals);
}

int64_t qb_depthwise(const Weight* weight, const Finish* finish, const Window* window, const Rows* rows,
                     const Operands* operands) {
  return Call()->depthwise(*weight, *finish, *window, *rows, *operands);
}

int32_t qb_winograd_pays(int64_t outputs, const Window* window) { return Call()->winograd_pays(outputs, *window); }

int64_t qb_packed_winograd_size(int64_t outputs, int64_t inputs) { return Call()->packed_winograd_size(outputs, inputs); }

void qb_pack_winograd(const int8_t* weight, const int32_t* zero_points, int64_t outputs, int64_t inputs, int8_t* packed,
                      int32_t* totals) {
  Call()->pack_winograd(weight, zero_points, outputs, inputs, packed, totals);
}

int64_t qb_winograd(const Weight* weight, const Finish* finish, const Window* window, const Rows* rows,
                    const Operands* operands) {
  return Call()->winograd(*weight, *finish, *window, *rows, *operands);
}

int64_t qb_transposed(const Weight* weight, const Finish* finish, const Window* window, const Rows* rows,
                      const Operands* operands, int64_t phases, int64_t taps) {
  return Call()->transposed(weight, *finish, window, *rows, *operands, phases, taps);
}

int64_t qb_weight_only(const Weight* weight, const float* scales, const Finish* finish, const Window* window,
                       const Operands* operands) {
  return Call()->weight_only(*weight, scales, *finish, *window, *operands);
}

int64_t qb_weight_only_transposed(const Weight* weights, const float* scales, const Finish* finish, const Window* windows,
                                  const Operands* operands, int64_t phases, int64_t taps) {
  return Call()->weight_only_transposed(weights, scales, *finish, windows, *operands, phases, taps);
}

int64_t qb_weight_only_depthwise(const int8_t* weight, const int32_t* zero_points, const float* scales,
                                 const float* bias, const Window* window, const Operands* operands) {
  return Call()->weight_only_depthwise(weight, zero_points, scales, bias, *window, *operands);
}

int64_t qb_lstm(const Recurrent* r, const uint8_t* x, const uint8_t* h, float* c, uint8_t* y) {
  return Call()->lstm(*r, x, h, c, y);
}

int64_t qb_dynamic_lstm(const Recurrent* r, const uint8_t* x, const float* x_scales, const int32_t* x_zero_points,
                        const float* h, float* c, float* y) {
  return Call()->dynamic_lstm(*r, x, x_scales, x_zero_points, h, c, y);
}

int64_t qb_weight_only_lstm(const Recurrent* r, const float* scales_ih, const float* scales_hh, const float* x,
                            const float* h, float* c, float* y) {
  return Call()->weight_only_lstm(*r, scales_ih, scales_hh, x, h, c, y);
}

int64_t qb_attention(const Attention* a, const uint8_t* q, const uint8_t* k, const uint8_t* v, uint8_t* y) {
  return Call()->attention(*a, q, k, v, y);
}

int64_t qb_dynamic_attention(const Attention* a, const Quantized* q, const Quantized* k, const Quantized* v,
                             int32_t by_value, int32_t affine, float* y) {
  return Call()->dynamic_attention(*a, *q, *k, *v, by_value, affine, y);
}

int64_t qb_probabilities(const Attention* a, const Quantized* q, const Quantized* k, float* y) {
  return Call()->probabilities(*a, *q, *k, y);
}

int64_t qb_weighted_values(const Attention* a, const Quantized* p, const Quantized* v, float* y) {
  return Call()->weighted_values(*a, *p, *v, y);
}

void qb_layer_norm(const uint8_t* x, int64_t rows, int64_t count, int32_t x_zero, double x_scale, double eps,
                   const float* gamma, const float* beta, int32_t zero_point, int32_t q_min, int32_t q_max,
                   uint8_t* y) {
  Call()->layer_norm(x, rows, count, x_zero, x_scale, eps, gamma, beta, Codes(zero_point, q_min, q_max), y);
}

void qb_quantize(const float* x, int64_t count, float scale, int32_t zero_point, int32_t q_min, int32_t q_max,
                 uint8_t* y) {
  Call()->quantize(x, count, scale, Codes(zero_point, q_min, q_max), y);
}

int32_t qb_quantize_rows(const float* x, int64_t rows, int64_t count, int32_t affine, uint8_t* y, float* scales,
                         int32_t* zero_points) {
  return Call()->quantize_rows(x, rows, count, affine != 0, y, scales, zero_points);
}

void qb_dequantize(const uint8_t* x, int64_t count, float scale, int32_t zero_point, float* y) {
  Call()->dequantize(x, count, scale, zero_point, y);
}

void qb_add(const uint8_t* a, const uint8_t* b, int64_t count, int32_t a_zero, float m_a, int32_t b_zero, float m_b,
            int32_t zero_point, int32_t q_min, int32_t q_max, uint8_t* y) {
  Call()->add(a, b, count, a_zero, m_a, b_zero, m_b, Codes(zero_point, q_min, q_max), y);
}

void qb_mul(const uint8_t* a, const uint8_t* b, int64_t count, int32_t a_zero, int32_t b_zero, float m,
            int32_t zero_point, int32_t q_min, int32_t q_max, uint8_t* y) {
  Call()->mul(a, b, count, a_zero, b_zero, m, Codes(zero_point, q_min, q_max), y);
}

void qb_table(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* y) {
  Call()->look_up(x, count, table, y);
}

void qb_average(const uint8_t* x, const Averaging* windows, int64_t samples, int32_t zero_point, int32_t q_min,
                int32_t q_max, uint8_t* y) {
  Call()->average(x, *windows, samples, Codes(zero_point, q_min, q_max), y);
}

void qb_channel_affine(const uint8_t* x, int64_t pixels, int64_t channels, int32_t x_zero, const float* gamma,
                       const float* beta, int32_t zero_point, int32_t q_min, int32_t q_max, uint8_t* y) {
  Call()->channel_affine(x, pixels, channels, x_zero, gamma, beta, Codes(zero_point, q_min, q_max), y);
}

void qb_max_pool(const uint8_t* x, const Window* window, int64_t samples, uint8_t* y) {
  Call()->max_pool(x, *window, samples, y);
}
}
