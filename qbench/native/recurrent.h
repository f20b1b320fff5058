// An LSTM layer in one direction: the products of x for some steps at once, then step by step those of h and the cell.
//
// Every other step goes through the weight of h backwards: it may just not fit into a cache, which then still holds the
// end that the last step left there.

namespace {

constexpr int64_t STEPS_AT_ONCE = 32;  // whose gates stay in the cache

// One step of one sample: gates i, f, g, o [4 * hidden]; c is read and written.
inline void cell(const float* __restrict gates, int64_t hidden, float* __restrict c, float* __restrict h) {
  const float *i = gates, *f = gates + hidden, *g = gates + 2 * hidden, *o = gates + 3 * hidden;
  for (int64_t j = 0; j < hidden; j += TILE) {
    const int64_t some = hidden - j;
    const auto at = [j, some](const float* x) { return taken<Floats>(x + j, some); };
    const Floats kept = sigmoid(at(f)) * at(c) + sigmoid(at(i)) * hyperbolic_tangent(at(g));
    put(kept, some, c + j);
    put(sigmoid(at(o)) * hyperbolic_tangent(kept), some, h + j);
  }
}

Window rows_of(int64_t inputs, int64_t block) {
  return Window{1, 1, inputs, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, block};
}

template <class Run>
void for_samples(int64_t samples, int64_t hidden, const Run& run) {
  const int threads = threads_for(samples * hidden * 64, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t n = 0; n < samples; ++n) run(n);
}

int64_t lstm(const Recurrent& r, const uint8_t* x, const uint8_t* h, float* c, uint8_t* y) {
  const int64_t n = r.samples, hidden = r.hidden, all = 4 * hidden;
  const Window x_window = rows_of(r.weight_ih.depth, r.weight_ih.block_depth);
  const Window h_window = rows_of(hidden, r.weight_hh.block_depth);
  const Rows x_rows{&r.x_zero_point, nullptr, INT64_MAX}, h_rows{&r.zero_point, nullptr, INT64_MAX};
  const Codes codes(r.zero_point, r.q_min, r.q_max);
  static thread_local Scratch given, stepped, states;
  float* gates = given.of<float>(std::min(STEPS_AT_ONCE, r.steps) * n * all);
  float* step = stepped.of<float>(n * all);
  float* values = states.of<float>(n * hidden);
  if (!gates || !step || !values) return 0;
  int64_t macs = 0;
  for (int64_t first = 0; first < r.steps; first += STEPS_AT_ONCE) {
    const int64_t count = std::min(STEPS_AT_ONCE, r.steps - first);
    macs += layer(r.weight_ih, r.finish_ih, x_window, x_rows,
                  {x + first * n * r.weight_ih.depth, nullptr, nullptr, gates, count * n});
    for (int64_t t = first; t < first + count; ++t) {
      macs += ordered_layer(r.weight_hh, r.finish_hh, h_window, h_rows,
                            {h, nullptr, gates + (t - first) * n * all, step, n}, t % 2);
      uint8_t* out = y + t * n * hidden;
      for_samples(n, hidden, [=, scale = r.scale](int64_t s) {
        cell(step + s * all, hidden, c + s * hidden, values + s * hidden);
        encode(codes, s * hidden, (s + 1) * hidden, out, [=](int64_t j, int64_t some) {
          return taken<Floats>(values + j, some) / scale;
        });
      });
      h = out;
    }
  }
  return macs;
}

int64_t dynamic_lstm(const Recurrent& r, const uint8_t* x, const float* x_scales, const int32_t* x_zero_points,
                     const float* h, float* c, float* y) {
  const int64_t n = r.samples, hidden = r.hidden, all = 4 * hidden, inputs = r.weight_ih.depth;
  const Window x_window = rows_of(inputs, r.weight_ih.block_depth);
  const Window h_window = rows_of(hidden, r.weight_hh.block_depth);
  const int64_t h_count = r.per_row ? n : 1;
  static thread_local Scratch given, stepped, coded, scaled, shifted;
  float* gates = given.of<float>(std::min(STEPS_AT_ONCE, r.steps) * n * all);
  float* step = stepped.of<float>(n * all);
  uint8_t* h_codes = coded.of<uint8_t>(n * hidden);
  float* h_scales = scaled.of<float>(h_count);
  int32_t* h_zero_points = shifted.of<int32_t>(h_count);
  if (!gates || !step || !h_codes || !h_scales || !h_zero_points) return 0;
  int64_t macs = 0;
  for (int64_t first = 0; first < r.steps; first += STEPS_AT_ONCE) {
    const int64_t count = std::min(STEPS_AT_ONCE, r.steps - first), row = r.per_row ? first * n : 0;
    const Rows x_rows{x_zero_points + row, x_scales + row, r.per_row ? 1 : INT64_MAX};
    macs += layer(r.weight_ih, r.finish_ih, x_window, x_rows,
                  {x + first * n * inputs, nullptr, nullptr, gates, count * n});
    for (int64_t t = first; t < first + count; ++t) {
      if (quantize_rows(h, h_count, n * hidden / h_count, r.affine, h_codes, h_scales, h_zero_points)) return -1;
      const Rows h_rows{h_zero_points, h_scales, r.per_row ? 1 : INT64_MAX};
      macs += ordered_layer(r.weight_hh, r.finish_hh, h_window, h_rows,
                            {h_codes, nullptr, gates + (t - first) * n * all, step, n}, t % 2);
      float* out = y + t * n * hidden;
      for_samples(n, hidden, [=](int64_t s) { cell(step + s * all, hidden, c + s * hidden, out + s * hidden); });
      h = out;
    }
  }
  return macs;
}

int64_t weight_only_lstm(const Recurrent& r, const float* scales_ih, const float* scales_hh, const float* x,
                         const float* h, float* c, float* y) {
  const int64_t n = r.samples, hidden = r.hidden, all = 4 * hidden, inputs = r.weight_ih.depth;
  const Window x_window = rows_of(inputs, r.weight_ih.block_depth);
  const Window h_window = rows_of(hidden, r.weight_hh.block_depth);
  static thread_local Scratch given, stepped;
  float* gates = given.of<float>(std::min(STEPS_AT_ONCE, r.steps) * n * all);
  float* step = stepped.of<float>(n * all);
  if (!gates || !step) return 0;
  int64_t macs = 0;
  for (int64_t first = 0; first < r.steps; first += STEPS_AT_ONCE) {
    const int64_t count = std::min(STEPS_AT_ONCE, r.steps - first);
    macs += weight_only(r.weight_ih, scales_ih, r.finish_ih, x_window,
                        {x + first * n * inputs, nullptr, nullptr, gates, count * n});
    for (int64_t t = first; t < first + count; ++t) {
      macs += ordered_weight_only(r.weight_hh, scales_hh, r.finish_hh, h_window,
                                  {h, nullptr, gates + (t - first) * n * all, step, n}, t % 2);
      float* out = y + t * n * hidden;
      for_samples(n, hidden, [=](int64_t s) { cell(step + s * all, hidden, c + s * hidden, out + s * hidden); });
      h = out;
    }
  }
  return macs;
}

}  // namespace
