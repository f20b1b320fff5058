// An LSTM layer in one direction: the products of x for some steps at once, then step by step those of h and the cell.
//
// In int8 every other step goes through the weight of h backwards: it may just not fit into a cache, which then still holds the
// end that the last step left there.

namespace {

constexpr int64_t STEPS_AT_ONCE = 32;      // whose gates stay in the cache
constexpr int64_t READY = int64_t(1) << 18;  // weights that are read back once for all steps: a mebibyte of float32

// One step of one sample, units [from, to): gates i, f, g, o [4 * hidden]; c is read and written.
inline void cell(const float* __restrict gates, int64_t hidden, int64_t from, int64_t to, float* __restrict c,
                 float* __restrict h) {
  const float *i = gates, *f = gates + hidden, *g = gates + 2 * hidden, *o = gates + 3 * hidden;
  const auto at = [to](const float* x, int64_t j) { return taken<Floats>(x + j, to - j); };
  for (int64_t j = from; j < to; j += TILE)
    put(sigmoid(at(f, j)) * at(c, j) + sigmoid(at(i, j)) * hyperbolic_tangent(at(g, j)), to - j, c + j);
  for (int64_t j = from; j < to; j += TILE)  // on its own, as it waits for the first
    put(sigmoid(at(o, j)) * hyperbolic_tangent(at(c, j)), to - j, h + j);
}

Window rows_of(int64_t inputs, int64_t block) {
  return Window{1, 1, inputs, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, block};
}

// What a thread does of every step: some of the outputs of the products, some of the units of the cells. The threads stay
// together for all steps of a sequence, as two or three meetings a step cost less than as many beginnings.
struct Share {
  int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();

  int64_t begin(int64_t count) const { return part * count / parts; }
  int64_t end(int64_t count) const { return (part + 1) * count / parts; }

  void products(const Product& p, bool backwards) const {
    const int64_t bands = (p.tiles + WIDE - 1) / WIDE, panels = std::max<int64_t>(p.total > 0, p.total / PANEL);
    for (int64_t index = 0; index < panels; ++index) {
      const int64_t first = index * p.total / panels, count = (index + 1) * p.total / panels - first;
      panel(p, first, count, begin(bands) * WIDE, std::min(end(bands) * WIDE, p.tiles), backwards);
    }
  }

  void float_products(const Product& p, const Pieced& list, const float* scales, const float* ready) const {
    const int64_t bands = (p.tiles + FLOAT_TILES - 1) / FLOAT_TILES, panels = (p.total + FLOAT_PANEL - 1) / FLOAT_PANEL;
    const bool by_rows = bands < parts;
    for (int64_t index = by_rows ? begin(panels) : 0; index < (by_rows ? end(panels) : panels); ++index) {
      const int64_t first = index * p.total / panels, count = (index + 1) * p.total / panels - first;
      float_panel(p, list, scales, first, count, by_rows ? 0 : begin(bands) * FLOAT_TILES,
                  by_rows ? p.tiles : std::min(end(bands) * FLOAT_TILES, p.tiles), ready);
    }
  }

  // run(sample, first unit, end of the units).
  template <class Run>
  void cells(int64_t samples, int64_t hidden, const Run& run) const {
    const int64_t tiles = (hidden + TILE - 1) / TILE;
    const int64_t from = begin(tiles) * TILE, to = std::min(end(tiles) * TILE, hidden);
    for (int64_t s = 0; from < to && s < samples; ++s) run(s, from, to);
  }
};

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
  const int threads = threads_for(n * all * hidden, WORTH_A_THREAD);
  int64_t macs = 0;
  for (int64_t first = 0; first < r.steps; first += STEPS_AT_ONCE) {
    const int64_t count = std::min(STEPS_AT_ONCE, r.steps - first);
    macs += layer(r.weight_ih, r.finish_ih, x_window, x_rows,
                  {x + first * n * r.weight_ih.depth, nullptr, nullptr, gates, count * n});
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Share share;
      const TileRegisters registers;
      for (int64_t t = first; t < first + count; ++t) {
        const uint8_t* before = t ? y + (t - 1) * n * hidden : h;
        const Operands operands{before, nullptr, gates + (t - first) * n * all, step, n};
        share.products(Product(r.weight_hh, r.finish_hh, h_window, h_rows, operands), t % 2);
#pragma omp barrier
        share.cells(n, hidden, [=, scale = r.scale](int64_t s, int64_t from, int64_t to) {
          cell(step + s * all, hidden, from, to, c + s * hidden, values + s * hidden);
          encode(codes, s * hidden + from, s * hidden + to, y + t * n * hidden, [=](int64_t j, int64_t some) {
            return taken<Floats>(values + j, some) / scale;
          });
        });
#pragma omp barrier
      }
    }
  }
  return macs + r.steps * n * all * hidden;
}

int64_t dynamic_lstm(const Recurrent& r, const uint8_t* x, const float* x_scales, const int32_t* x_zero_points,
                     const float* h, float* c, float* y) {
  const int64_t n = r.samples, hidden = r.hidden, all = 4 * hidden, inputs = r.weight_ih.depth;
  const Window x_window = rows_of(inputs, r.weight_ih.block_depth);
  const Window h_window = rows_of(hidden, r.weight_hh.block_depth);
  const int64_t h_count = r.per_row ? n : 1, length = h_count ? n * hidden / h_count : 0;  // rows of h that become codes
  static thread_local Scratch given, stepped, coded, scaled, shifted;
  float* gates = given.of<float>(std::min(STEPS_AT_ONCE, r.steps) * n * all);
  float* step = stepped.of<float>(n * all);
  uint8_t* h_codes = coded.of<uint8_t>(n * hidden);
  float* h_scales = scaled.of<float>(h_count);
  int32_t* h_zero_points = shifted.of<int32_t>(h_count);
  if (!gates || !step || !h_codes || !h_scales || !h_zero_points) return 0;
  const Rows h_rows{h_zero_points, h_scales, r.per_row ? 1 : INT64_MAX};
  const int threads = threads_for(n * all * hidden, WORTH_A_THREAD);
  std::atomic<bool> odd{false};
  int64_t macs = 0;
  for (int64_t first = 0; first < r.steps; first += STEPS_AT_ONCE) {
    const int64_t count = std::min(STEPS_AT_ONCE, r.steps - first), row = r.per_row ? first * n : 0;
    const Rows x_rows{x_zero_points + row, x_scales + row, r.per_row ? 1 : INT64_MAX};
    macs += layer(r.weight_ih, r.finish_ih, x_window, x_rows,
                  {x + first * n * inputs, nullptr, nullptr, gates, count * n});
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Share share;
      const TileRegisters registers;
      for (int64_t t = first; t < first + count; ++t) {
        const float* before = t ? y + (t - 1) * n * hidden : h;
        for (int64_t i = share.begin(h_count); i < share.end(h_count); ++i)
          if (!quantize_row(before + i * length, length, r.affine, h_codes + i * length, h_scales[i], h_zero_points[i]))
            odd = true;
#pragma omp barrier
        if (odd) break;  // every thread sees the same
        const Operands operands{h_codes, nullptr, gates + (t - first) * n * all, step, n};
        share.products(Product(r.weight_hh, r.finish_hh, h_window, h_rows, operands), t % 2);
#pragma omp barrier
        share.cells(n, hidden, [=](int64_t s, int64_t from, int64_t to) {
          cell(step + s * all, hidden, from, to, c + s * hidden, y + (t * n + s) * hidden);
        });
#pragma omp barrier
      }
    }
    if (odd) return -1;
  }
  return macs + r.steps * n * all * hidden;
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
  const int threads = threads_for(n * all * hidden, WORTH_A_THREAD);
  const Rows none{nullptr, nullptr, INT64_MAX};
  static thread_local Pieced made;
  static thread_local Scratch read;
  const Operands example{h, nullptr, nullptr, step, n};
  const Product one(r.weight_hh, r.finish_hh, h_window, none, example);
  pieces_of(one, made);
  const Pieced& list = made;
  float* ready = nullptr;
  if (r.steps > 1 && !list.in_registers && all * hidden <= READY) {
    ready = read.of<float>(one.tiles * TILE * hidden);
    if (!ready) return 0;
    read_back_all(one, list, ready);
  }
  int64_t macs = 0;
  for (int64_t first = 0; first < r.steps; first += STEPS_AT_ONCE) {
    const int64_t count = std::min(STEPS_AT_ONCE, r.steps - first);
    macs += weight_only(r.weight_ih, scales_ih, r.finish_ih, x_window,
                        {x + first * n * inputs, nullptr, nullptr, gates, count * n});
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Share share;
      for (int64_t t = first; t < first + count; ++t) {
        const float* before = t ? y + (t - 1) * n * hidden : h;
        const Operands operands{before, nullptr, gates + (t - first) * n * all, step, n};
        const Product p(r.weight_hh, r.finish_hh, h_window, none, operands);
        share.float_products(p, list, scales_hh, ready);
#pragma omp barrier
        share.cells(n, hidden, [=](int64_t s, int64_t from, int64_t to) {
          cell(step + s * all, hidden, from, to, c + s * hidden, y + (t * n + s) * hidden);
        });
#pragma omp barrier
      }
    }
  }
  return macs + r.steps * n * all * hidden;
}

}  // namespace
