// The int8 engine: what each function promises. Arithmetic: docstring of qbench/backends/reference_kernels.py.
//
// Layouts. Images are channels last, [samples][height][width][channels]; rows are [rows][inputs], an image of 1 x 1
// pixels. Codes are uint8, weights int8; sums are exact int32. Every float32 step is rounded on its own: compile with
// -ffp-contract=off and without -ffast-math. Pointers that may be null say so. No function allocates anything that it
// returns; scratch is kept for each thread and reused. Where there is no memory for scratch, a function leaves its results
// unfinished and errno is ENOMEM after it; else errno is 0. Every function may be called by several threads at once.
#pragma once

#include <cstdint>

namespace qb {

constexpr int TILE = 16;  // outputs that lie side by side in a packed weight

// A weight [groups * outputs][depth], packed by qb_pack for the instruction set that runs. `depth` counts the products of one output, in the order
// block, kernel row, kernel column, input of the block; a block has `block_depth` of them, the last one may be shorter.
// Each `segment` of products, those whose inputs lie side by side, is filled up with zeros on its own; where there are
// several blocks it is a block.
struct Weight {
  const int8_t* values;        // [groups][blocks][tiles][depth / n][TILE][n], n products side by side
  const int32_t* totals;       // sum of the values of an output: [blocks][groups][tiles * TILE]
  const int32_t* zero_points;  // [blocks][groups][tiles * TILE]; null: all 0
  int64_t groups, outputs, depth, block_depth, segment;
};

// From the exact sums of an output to its result:
//   t = start + add;  t += f32(sum + bias - zero points) * (row scale *) multiplier  for each block;  t += residual
//   codes: R(t);  float: min(max(t + last, low), high)
struct Finish {
  const float* multiplier;  // [blocks][groups][tiles * TILE]
  const int32_t* bias;      // [groups][tiles * TILE]; null: none. Only with one block.
  const float* start;       // [groups][tiles * TILE]; null: none
  const float* last;        // [groups][tiles * TILE]; null: none
  float residual_multiplier;
  int32_t residual_zero_point;
  int32_t zero_point, q_min, q_max;
  float low, high;
  int32_t to_float;      // 0: codes
  const uint8_t* table;  // [256], each code is replaced by its entry; null: none
};

// How a kernel slides over an image; a linear layer is a 1 x 1 kernel over images of 1 x 1 pixels.
struct Window {
  int64_t height, width, channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  int64_t block;  // input channels (of a group) in a block of the weight
  // Where output pixels lie in a larger result [result_height][result_width]: from (first_row, first_column) in steps.
  int64_t result_height, result_width, first_row, first_column, step_height, step_width;  // result_width 0: they are it
};

// The zero points and scales of x: entry i holds for `pixels` output pixels, one after another.
struct Rows {
  const int32_t* zero_points;
  const float* scales;  // null: part of the multiplier
  int64_t pixels;       // INT64_MAX: entry 0 holds for all
  int64_t of(int64_t pixel) const { return pixels == INT64_MAX ? 0 : pixels == 1 ? pixel : pixel / pixels; }
  int64_t left(int64_t pixel) const { return pixels == INT64_MAX ? pixels : (of(pixel) + 1) * pixels - pixel; }  // with its entry
};

// An LSTM layer in one direction. finish_ih leaves float32 gates, finish_hh adds them to its own. The outputs of both weights
// are tiles of TILE: of the first TILE units those of gate i, then f, g and o, then so of the next units. The last units are
// filled up, so there are 4 * (`hidden` rounded up to TILE) outputs; weight_hh's depth is `hidden`.
struct Recurrent {
  Weight weight_ih, weight_hh;
  Finish finish_ih, finish_hh;
  int64_t steps, samples, hidden;
  float scale;  // of h
  int32_t x_zero_point, zero_point, q_min, q_max;
  int32_t affine, per_row;  // of the dynamic codes
};

// Elements from sample to sample, from head to head of a sample, from row to row; a row is in one piece.
struct HeadStrides {
  int64_t sample, head, row;
};

// q [heads][queries][depth], k [heads][keys][depth], v [heads][keys][width]; a head is one of a sample, which has `each`.
struct Attention {
  int64_t heads, queries, keys, depth, width, each;
  HeadStrides q, k, v, y;  // of static attention
  const float* mask;  // [heads][queries][keys], or [queries][keys] for all heads; null: none
  int32_t mask_shared, causal;
  float m_scores;  // static: of a score; dynamic: the factor
  float m;
  int32_t q_zero_point, k_zero_point, v_zero_point, zero_point, q_min, q_max;
};

// Windows of an average: [tops[i], bottoms[i]) x [lefts[j], rights[j]) inside the image, and what multiplies its sum.
struct Averaging {
  int64_t height, width, channels, out_height, out_width;
  const int64_t *tops, *bottoms, *lefts, *rights;
  const float* multipliers;  // [out_height][out_width]
  int32_t x_zero;
};

enum Sharing : int32_t { EACH_ROW, EACH_HEAD, ALL };

struct Quantized {  // codes with the scales of their rows
  const uint8_t* codes;
  const float* scales;
  const int32_t* zero_points;
  int32_t sharing;
};

// What the result of a call in a list means: nothing, products, or not 0 where it failed. Products below 0 are a failure.
enum Counting : int64_t { NOTHING, INT8_PRODUCTS, FLOAT32_PRODUCTS, FAILURE };

// A list of calls for qb_run, of a piece of a batch, and where in it addresses of inputs and results stand.
struct Replay {
  const uint64_t* calls;
  uint64_t* const* slots;
  int64_t count;
};

// What changes from call to call.
struct Operands {
  const void* x;            // uint8, or float32 under a weight-only layer
  const uint8_t* residual;  // like the result; null: none
  const float* add;         // like the result, which may be it: each output is read before it is written; null: none
  void* y;                  // uint8 or float32
  int64_t samples;
};

}  // namespace qb

// What the library exports: these functions and nothing else (all else is compiled with -fvisibility=hidden).
#pragma GCC visibility push(default)
extern "C" {

// The sha256 of the sources that the library was built from (the loader looks for it in the file), and the instruction
// set that runs: "avx2", "portable".
const char* qb_sources();
const char* qb_isa();

// Multiplies in registers alone, to tell what the core does at most; returns the number of products, 0: not known.
int64_t qb_peak(int64_t rounds);

// Packs a weight [groups][outputs][depth] (already in the order of Weight) into `packed` and `totals`; see qb::Weight.
void qb_pack(const int8_t* weight, int64_t groups, int64_t outputs, int64_t depth, int64_t block_depth, int64_t segment,
             int8_t* packed, int32_t* totals);
// The bytes of a packed weight.
int64_t qb_packed_size(int64_t groups, int64_t outputs, int64_t depth, int64_t block_depth, int64_t segment);

// A convolution or a linear layer. Returns the number of multiply-accumulates.
int64_t qb_layer(const qb::Weight*, const qb::Finish*, const qb::Window*, const qb::Rows*, const qb::Operands*);

// One input channel for each output channel, packed by qb_pack_depthwise from [channels][height][width]; the weight has one
// group and one block.
int64_t qb_depthwise(const qb::Weight*, const qb::Finish*, const qb::Window*, const qb::Rows*, const qb::Operands*);
void qb_pack_depthwise(const int8_t* weight, const int32_t* zero_points, int64_t channels, int64_t height, int64_t width,
                       int8_t* packed, int32_t* totals);
int64_t qb_packed_depthwise_size(int64_t channels, int64_t height, int64_t width);

// 3 x 3 taps of stride and dilation 1, one group and one block, by Winograd's minimal filtering: the same sums with fewer
// products, where 255 times what the taps of an output add up to is below 2^25, above and below 0 alike. Packed by
// qb_pack_winograd from [outputs][3][3][inputs] and the zero points of the outputs (null: all 0), which the packed weight has
// no more. Returns the multiply-accumulates of the convolution.
int64_t qb_winograd(const qb::Weight*, const qb::Finish*, const qb::Window*, const qb::Rows*, const qb::Operands*);
void qb_pack_winograd(const int8_t* weight, const int32_t* zero_points, int64_t outputs, int64_t inputs, int8_t* packed,
                      int32_t* totals);
int64_t qb_packed_winograd_size(int64_t outputs, int64_t inputs);
// Not 0 where it is faster than qb_layer on the path that runs.
int32_t qb_winograd_pays(int64_t outputs, const qb::Window*);

// A transposed convolution as `phases` ordinary ones: those output pixels that the same taps reach, one weight and window
// each (dilation may be negative). Returns the products of every input pixel with every tap: `taps` of them an output.
int64_t qb_transposed(const qb::Weight*, const qb::Finish*, const qb::Window*, const qb::Rows*, const qb::Operands*,
                      int64_t phases, int64_t taps);

// A convolution or a linear layer of float32 x: the weight is read back as float32, some tiles and products of it at a
// time. `scales` is laid out as the multiplier of Finish, of which bias is `last`. Sums in any order, products fused.
int64_t qb_weight_only(const qb::Weight*, const float* scales, const qb::Finish*, const qb::Window*,
                       const qb::Operands*);
// As qb_transposed; `scales` hold for the weights of all phases.
int64_t qb_weight_only_transposed(const qb::Weight*, const float* scales, const qb::Finish*, const qb::Window*,
                                  const qb::Operands*, int64_t phases, int64_t taps);
// One input channel for each output channel: weight [kernel height][kernel width][channels], not packed; zero_points
// (null: all 0), scales and bias (null: none) [channels].
int64_t qb_weight_only_depthwise(const int8_t* weight, const int32_t* zero_points, const float* scales,
                                 const float* bias, const qb::Window*, const qb::Operands*);

// LSTM layers: c [samples][hidden] is read and written, y [steps][samples][hidden]. Return the multiply-accumulates, -1
// where a value is not finite.
int64_t qb_lstm(const qb::Recurrent*, const uint8_t* x, const uint8_t* h, float* c, uint8_t* y);
int64_t qb_dynamic_lstm(const qb::Recurrent*, const uint8_t* x, const float* x_scales, const int32_t* x_zero_points,
                        const float* h, float* c, float* y);
int64_t qb_weight_only_lstm(const qb::Recurrent*, const float* scales_ih, const float* scales_hh, const float* x,
                            const float* h, float* c, float* y);

// Attention. The dynamic one, where each row of probabilities has a scale of its own, returns -1 where one is not finite;
// where all share one it comes in two halves, between which the probabilities become codes.
int64_t qb_attention(const qb::Attention*, const uint8_t* q, const uint8_t* k, const uint8_t* v, uint8_t* y);
int64_t qb_dynamic_attention(const qb::Attention*, const qb::Quantized* q, const qb::Quantized* k,
                             const qb::Quantized* v, int32_t by_value, int32_t affine, float* y);
int64_t qb_probabilities(const qb::Attention*, const qb::Quantized* q, const qb::Quantized* k, float* y);
int64_t qb_weighted_values(const qb::Attention*, const qb::Quantized* p, const qb::Quantized* v, float* y);

// R(((q - zero point) - mean) * rstd * gamma + beta) over rows of `count` codes.
void qb_layer_norm(const uint8_t* x, int64_t rows, int64_t count, int32_t x_zero, double x_scale, double eps,
                   const float* gamma, const float* beta, int32_t zero_point, int32_t q_min, int32_t q_max, uint8_t* y);

// Codes of x, rounded half to even after a true division by `scale`; NaN gives q_min.
void qb_quantize(const float* x, int64_t count, float scale, int32_t zero_point, int32_t q_min, int32_t q_max,
                 uint8_t* y);
// Codes of each of `rows` rows of `count` values with its own range; `affine` 0: symmetric. Returns 0, or 1 where a
// value is not finite.
int32_t qb_quantize_rows(const float* x, int64_t rows, int64_t count, int32_t affine, uint8_t* y, float* scales,
                         int32_t* zero_points);
// (q - zero point) * scale.
void qb_dequantize(const uint8_t* x, int64_t count, float scale, int32_t zero_point, float* y);
// R((a - a_zero) * m_a + (b - b_zero) * m_b).
void qb_add(const uint8_t* a, const uint8_t* b, int64_t count, int32_t a_zero, float m_a, int32_t b_zero, float m_b,
            int32_t zero_point, int32_t q_min, int32_t q_max, uint8_t* y);
// R((a - a_zero) * (b - b_zero) * m).
void qb_mul(const uint8_t* a, const uint8_t* b, int64_t count, int32_t a_zero, int32_t b_zero, float m,
            int32_t zero_point, int32_t q_min, int32_t q_max, uint8_t* y);
// table[x].
void qb_table(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* y);
// R(sum over each window of (q - x_zero) * its multiplier).
void qb_average(const uint8_t* x, const qb::Averaging*, int64_t samples, int32_t zero_point, int32_t q_min,
                int32_t q_max, uint8_t* y);
// R((q - x_zero) * gamma + beta): x [pixels][channels].
void qb_channel_affine(const uint8_t* x, int64_t pixels, int64_t channels, int32_t x_zero, const float* gamma,
                       const float* beta, int32_t zero_point, int32_t q_min, int32_t q_max, uint8_t* y);
// Rows of a table: y[i] = table[indices[i]], each `bytes` long. Returns 0, or -1 where an index is not one of `rows`.
int32_t qb_rows(const void* table, int64_t rows, int64_t bytes, const int64_t* indices, int64_t count, void* y);
// Copies elements of `bytes` from one strided tensor to another; strides in elements.
void qb_copy(const void* x, const int64_t* x_strides, void* y, const int64_t* y_strides, const int64_t* sizes,
             int64_t dimensions, int64_t bytes);
// Fills `count` bytes of memory.
void qb_fill(void* y, int64_t count, int32_t byte);
// The largest code in each window; padding never wins.
void qb_max_pool(const uint8_t* x, const qb::Window*, int64_t samples, uint8_t* y);

// Runs calls of the functions above that were written down, one after another: for each its caller, what its result
// counts as (qb::Counting), how many words of 8 bytes its arguments take, and these. Adds products to macs[0] (int8) and
// macs[1] (float32). Returns 0, or 1 + the index of a call that failed, after which none is run.
int64_t qb_run(const uint64_t* calls, int64_t count, int64_t* macs);
// Runs the pieces of a batch, side by side on as many threads as there are `replays`, all of one program: for piece p
// slot i is starts[i] + p * steps[i]. Adds products and returns as qb_run does.
int64_t qb_run_apart(const qb::Replay* replays, const uint64_t* starts, const int64_t* steps, int64_t* macs,
                     int64_t threads, int64_t slots, int64_t pieces);
// The caller of a function for qb_run, by its name; null: there is none.
const void* qb_caller(const char* name);
}
#pragma GCC visibility pop
