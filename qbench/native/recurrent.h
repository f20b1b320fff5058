// An LSTM layer in one direction: the products of x for some steps at once, then step by step those of h and the cell.
//
// Outputs are in the order of qb::Recurrent: a thread has some units and all their gates, so that it meets the others once
// a step, for h (twice where h's range is taken as well). Its gates stay in its own cache: the product of h adds those of x,
// which are where its result goes. Of many samples in int8 no gate is written at all: a tile of units at a time both products
// and the cells, its gates in registers.
//
// Of many samples a thread that is through with its tiles takes some of another's: the cores may be busy with other things.
//
// In int8 every other step goes through the weight of h backwards: it may just not fit into a cache, which then still holds the
// end that the last step left there.

namespace {

static_assert(GATES % FLOAT_TILES == 0, "a tile of units has whole blocks of tiles of outputs");
constexpr int64_t ROWS_AT_ONCE = 64, FLOAT_ROWS_AT_ONCE = FLOAT_PANEL;  // steps of samples whose gates stay in the cache
constexpr int64_t SAMPLES = 16;  // at least, where threads share them: rows of a tile register; woq reads its weight back for them
constexpr int64_t MOST_THREADS = 64;
constexpr int64_t READY = int64_t(1) << 18;  // weights that are read back once for all steps: a mebibyte of float32

enum Gate { INPUT, FORGET, CELL, OUTPUT };

// `count` (at most TILE) units of one sample: from `at` on in its states.
struct Units {
  int64_t at, count;

  Floats of(const float* states) const { return taken<Floats>(states + at, count); }
  void put_to(float* states, Floats v) const { put(v, count, states + at); }
};

constexpr int CELLS = TILES_OF<ManyFloats>;  // tiles of units side by side

inline ManyFloats states_of(const Units (&units)[CELLS], const float* states) {
  return of_tiles<ManyFloats>([&](int i) { return units[i].of(states); });
}

// A step of CELLS tiles of units side by side, some of which may be the same: of `c`, which is read and written, and then of h,
// on its own as it waits for c. gate(i, which) is the ith's; use(units, h).
template <class GateOf>
inline void step_of_c(const Units (&units)[CELLS], const GateOf& gate, float* c) {
  const auto all = [&](Gate which) { return of_tiles<ManyFloats>([&](int i) { return gate(i, which); }); };
  const ManyFloats now = sigmoid(all(FORGET)) * states_of(units, c) + sigmoid(all(INPUT)) * hyperbolic_tangent(all(CELL));
  each_tile(now, [&](int i, Floats v) { units[i].put_to(c, v); });
}
template <class GateOf, class Use>
inline void step_of_h(const Units (&units)[CELLS], const GateOf& gate, const float* c, const Use& use) {
  const auto outputs = of_tiles<ManyFloats>([&](int i) { return gate(i, OUTPUT); });
  each_tile(sigmoid(outputs) * hyperbolic_tangent(states_of(units, c)), [&](int i, Floats v) { use(units[i], v); });
}

Window rows_of(int64_t inputs, int64_t block) {
  return Window{1, 1, inputs, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, block};
}

// The steps of a sequence in parts of about as many: as many as `rows` rows (steps of samples) hold, one at least.
struct Parts {
  int64_t steps, count;

  Parts(const Recurrent& r, int64_t rows) : steps(r.steps) {
    const int64_t longest = std::clamp<int64_t>(rows / std::max<int64_t>(r.samples, 1), 1, std::max<int64_t>(steps, 1));
    count = std::max<int64_t>((steps + longest - 1) / longest, 1);
  }

  int64_t begin(int64_t part) const { return part * steps / count; }
  int64_t longest() const { return (steps + count - 1) / count; }
};

// How many parts units and samples are cut into: so that the largest is small, into parts of units where that is about the
// same, as each of them reads its own weights alone.
struct Grid {
  int64_t units = 1, samples = 1;

  Grid(const Recurrent& r, int64_t threads) {
    const int64_t tiles = std::max<int64_t>((r.hidden + TILE - 1) / TILE, 1);
    int64_t least = INT64_MAX;
    for (int64_t u = std::min(tiles, threads); u > 0; --u) {
      const int64_t s = std::clamp<int64_t>(r.samples / SAMPLES, 1, threads / u);
      const int64_t largest = (tiles + u - 1) / u * ((r.samples + s - 1) / s);
      if (least == INT64_MAX || largest < least - least / 8) least = largest, units = u, samples = s;
    }
  }
};

int threads_of(const Recurrent& r) {
  const int64_t work = r.samples * GATES * r.hidden * (r.hidden + r.weight_ih.depth);  // from one meeting to the next
  const int64_t most = std::clamp<int64_t>(work / WORTH_A_THREAD, 1, MOST_THREADS);
  const int64_t threads = std::min<int64_t>(threads_for(work, WORTH_A_THREAD), most);
  const Grid grid(r, threads);
  return int(grid.units * grid.samples);
}

// Where the threads of a team wait for each other, and what they have taken of each other's work since they last met.
// OpenMP's barrier calls the system each time.
class Meeting {
 public:
  // The next of a thread's works, `end` where those before it are taken.
  int64_t take(int64_t thread, int64_t end) {
    std::atomic<int64_t>& taken = works_[thread].taken;
    int64_t work = taken.load(std::memory_order_relaxed);
    while (work < end && !taken.compare_exchange_weak(work, work + 1, std::memory_order_relaxed)) {
    }
    return std::min(work, end);
  }

  void wait() {
    const int64_t now = over_.load(std::memory_order_relaxed), threads = omp_get_num_threads();
    if (there_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      there_.store(0, std::memory_order_relaxed);
      for (int64_t i = 0; i < threads; ++i) works_[i].taken.store(0, std::memory_order_relaxed);
      return over_.store(now + 1, std::memory_order_release);
    }
    for (int64_t turn = 0; over_.load(std::memory_order_acquire) == now; ++turn)
      if (turn > PATIENCE) std::this_thread::yield();  // there may be fewer cores than threads
  }

 private:
  static constexpr int64_t PATIENCE = 10000;

  struct alignas(64) Works {
    std::atomic<int64_t> taken{0};
  };

  Works works_[MOST_THREADS];
  alignas(64) std::atomic<int> there_{0};
  alignas(64) std::atomic<int64_t> over_{0};  // meetings
};

// What a thread does of every step: tiles of units [from, to) of the samples [first, end). The threads stay together for all
// steps of a sequence, as a meeting costs less than a beginning.
struct Share {
  int64_t hidden, samples, tiles, columns, column, row, from = 0, to = 0, first = 0, end = 0;

  explicit Share(const Recurrent& r) : hidden(r.hidden), samples(r.samples), tiles((r.hidden + TILE - 1) / TILE) {
    const Grid grid(r, omp_get_num_threads());
    columns = grid.units, column = omp_get_thread_num() % columns, row = omp_get_thread_num() / columns;
    if (row >= grid.samples) return;  // there are more threads than parts
    from = begin_of(column), to = begin_of(column + 1);
    first = row * samples / grid.samples, end = (row + 1) * samples / grid.samples;
  }

  int64_t begin_of(int64_t of) const { return of * tiles / columns; }

  // The next tile of units of a step's panel of its samples: one of its own, else of a thread with the same samples; -1: none.
  int64_t take(Meeting& meeting, int64_t panel, bool backwards) const {
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t of = (column + k) % columns, begin = begin_of(of), end = begin_of(of + 1), count = end - begin;
      const int64_t index = meeting.take(row * columns + of, (panel + 1) * count) - panel * count;
      if (index < count) return backwards ? end - 1 - index : begin + index;
    }
    return -1;
  }

  // use(first row, rows) for this thread's rows in `steps` steps, in panels of at most `most` rows; where they may be longer,
  // of fewer than twice as many.
  template <class Use>
  void panels(int64_t steps, int64_t most, bool longer, const Use& use) const {
    const bool all = end - first == samples;
    const int64_t runs = all ? 1 : steps, length = all ? steps * samples : end - first;
    const int64_t count = longer ? std::max<int64_t>(length > 0, length / most) : (length + most - 1) / most;
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t index = 0; index < count; ++index) {
        const int64_t at = index * length / count;
        use(first + run * samples + at, (index + 1) * length / count - at);
      }
  }

  void products(const Product& p, int64_t steps, bool backwards) const {
    panels(steps, PANEL, true, [&](int64_t row, int64_t rows) { panel(p, row, rows, GATES * from, GATES * to, backwards); });
  }

  void float_products(const Product& p, int64_t steps, const Pieced& list, const float* scales, const float* ready) const {
    panels(steps, FLOAT_PANEL, false, [&](int64_t row, int64_t rows) {
      float_panel(p, list, scales, row, rows, GATES * from, GATES * to, ready);
    });
  }

  Units units_of(int64_t tile, int64_t sample) const {
    return {sample * hidden + tile * TILE, std::min<int64_t>(TILE, hidden - tile * TILE)};
  }

  // The cells of a step out of gates [samples][outputs], whose place the functions of them take: one at a time of all of them,
  // each for CELLS tiles at once, the last ones in the place of some that are not there.
  template <class Use>
  void cells(float* gates, int64_t outputs, float* c, const Use& use) const {
    const auto groups = [=](const auto& run) {
      int64_t sample = first, unit = from;
      for (int64_t left = (end - first) * (to - from); left > 0; left -= CELLS) {
        Units units[CELLS];
        float* at[CELLS];
        for (int i = 0; i < CELLS; ++i) {
          units[i] = units_of(unit, sample), at[i] = gates + sample * outputs + unit * GATES * TILE;
          if (left - i > 1 && ++unit == to) unit = from, ++sample;
        }
        const auto all = [&](Gate gate) { return of_tiles<ManyFloats>([&](int i) { return lanes_at(at[i] + gate * TILE); }); };
        const auto keep = [&](Gate gate, ManyFloats v) { each_tile(v, [&](int i, Floats tile) { set_lanes(at[i] + gate * TILE, tile); }); };
        run(units, all, keep);
      }
    };
    for (const Gate gate : {INPUT, FORGET, OUTPUT})
      groups([&](const auto&, const auto& all, const auto& keep) { keep(gate, sigmoid(all(gate))); });
    groups([&](const auto& units, const auto& all, const auto& keep) {
      const ManyFloats now = all(FORGET) * states_of(units, c) + all(INPUT) * hyperbolic_tangent(all(CELL));
      each_tile(now, [&](int i, Floats v) { units[i].put_to(c, v); });
      keep(CELL, now);
    });
    groups([&](const auto& units, const auto& all, const auto&) {
      each_tile(all(OUTPUT) * hyperbolic_tangent(all(CELL)), [&](int i, Floats v) { use(units[i], v); });
    });
  }
};

// A thread's steps whose gates are never written.
class Fused {
 public:
  struct Room {
    Addend::Room x, h;
    Scratch x_sums, h_sums;
  };

  static bool pays(const Recurrent& r) {
    const auto plain = [](const Weight& w, const Finish& f) { return w.depth > 0 && w.depth <= w.block_depth && !f.start; };
    return r.samples >= WORTH_FUSING && plain(r.weight_ih, r.finish_ih) && plain(r.weight_hh, r.finish_hh) && !r.finish_ih.last;
  }

  Fused(const Recurrent& r, const Share& thread, Room& room)
      : share(thread), own_zero_points(r.affine && r.per_row),
        x(r.weight_ih, r.finish_ih, room.x, thread.tiles * GATES * TILE),
        h(r.weight_hh, r.finish_hh, room.h, thread.tiles * GATES * TILE),
        x_sums(room.x_sums, 2 * ROWS_A_TURN), h_sums(room.h_sums, 2 * ROWS_A_TURN) {}

  bool there() const { return x.there() && h.there() && x_sums.first && h_sums.first; }

  // A step whose rows of x begin at `row` in its product. use(units, h).
  template <bool DYNAMIC, class Use>
  void step(Meeting& meeting, const Product& of_x, int64_t row, const Product& of_h, bool backwards, float* c, const Use& use) {
    const Addend::Terms<DYNAMIC> x_terms(x, of_x.rows), h_terms(h, of_h.rows);
    const UnitSums xs = x_sums, hs = h_sums;
    const float* const last = h.last;
    const int64_t samples = share.end - share.first, panels = std::max<int64_t>(samples > 0, samples / ROWS_A_TURN);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = share.first + panel * samples / panels, count = share.first + (panel + 1) * samples / panels - first;
      const Addend::Panel x_panel = x.panel(of_x, row + first, count, own_zero_points);
      const Addend::Panel h_panel = h.panel(of_h, first, count, own_zero_points);
      if (!x_panel.count || !h_panel.count) return;
      for (int64_t tile; (tile = share.take(meeting, panel, backwards)) >= 0;) {
        const int64_t outputs = tile * GATES * TILE;
        x.multiply_into(xs, of_x, x_panel, tile);
        h.multiply_into(hs, of_h, h_panel, tile);
        const auto gate_of = [&](int64_t r, Gate gate) {  // its sign counts for nothing where it is 0
          const int64_t j = outputs + gate * TILE;
          const Floats v = x_terms(xs.of(gate, r), j, row + first + r) + h_terms(hs.of(gate, r), j, first + r);
          return DYNAMIC ? v + lanes_at(last + j) : v;
        };
        const auto groups = [&](const auto& run) {
          for (int64_t r = 0; r < count; r += CELLS) {
            Units units[CELLS];
            int64_t rows[CELLS];
            for (int i = 0; i < CELLS; ++i) rows[i] = std::min(r + i, count - 1), units[i] = share.units_of(tile, first + rows[i]);
            run(units, [&](int i, Gate gate) { return gate_of(rows[i], gate); });
          }
        };
        groups([&](const auto& units, const auto& gate) { step_of_c(units, gate, c); });
        groups([&](const auto& units, const auto& gate) { step_of_h(units, gate, c, use); });
      }
    }
  }

  const Share& share;
  const bool own_zero_points;
  Addend x, h;

 private:
  const UnitSums x_sums, h_sums;
};

int64_t lstm(const Recurrent& r, const uint8_t* x, const uint8_t* h, float* c, uint8_t* y) {
  const int64_t n = r.samples, hidden = r.hidden, inputs = r.weight_ih.depth, outputs = r.weight_hh.outputs;
  const Window x_window = rows_of(inputs, r.weight_ih.block_depth), h_window = rows_of(hidden, r.weight_hh.block_depth);
  const Rows x_rows{&r.x_zero_point, nullptr, INT64_MAX}, h_rows{&r.zero_point, nullptr, INT64_MAX};
  const Codes codes(r.zero_point, r.q_min, r.q_max);
  const float inverse = 1.0f / r.scale;
  const Parts parts(r, ROWS_AT_ONCE);
  const bool can_fuse = Fused::pays(r) && !r.finish_hh.last;
  static thread_local Scratch given;
  float* gates = can_fuse ? nullptr : given.of<float>(parts.longest() * n * outputs);
  if (!gates && !can_fuse) return 0;
  const int threads = threads_of(r);
  Meeting meeting;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Fused::Room room;
    const Share share(r);
    const TileRegisters registers;
    std::optional<Fused> fused;
    if (can_fuse) fused.emplace(r, share, room);
    const bool fuses = fused && fused->there();
    if (fuses) fused->x.rows_have(r.x_zero_point), fused->h.rows_have(r.zero_point);
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t first = parts.begin(part), end = parts.begin(part + 1);
      const Operands given_x{x + first * n * inputs, nullptr, nullptr, gates, (end - first) * n};
      const Product of_x(r.weight_ih, r.finish_ih, x_window, x_rows, given_x);
      if (gates) share.products(of_x, end - first, false);
      for (int64_t t = first; t < end; ++t) {
        const uint8_t* before = t ? y + (t - 1) * n * hidden : h;
        float* step = gates ? gates + (t - first) * n * outputs : nullptr;
        const Operands given_h{before, nullptr, step, step, n};
        const Product of_h(r.weight_hh, r.finish_hh, h_window, h_rows, given_h);
        const auto use = [=, to = y + t * n * hidden, scale = r.scale](const Units& units, Floats now) {
          encode(codes, 0, units.count, to + units.at, [=](int64_t, int64_t) { return quotient(now, scale, inverse); });
        };
        if (fuses) {
          fused->step<false>(meeting, of_x, (t - first) * n, of_h, t % 2, c, use);
        } else if (gates) {
          share.products(of_h, 1, t % 2);
          share.cells(step, outputs, c, use);
        }
        meeting.wait();
      }
    }
  }
  return r.steps * n * GATES * hidden * (inputs + hidden);
}

int64_t dynamic_lstm(const Recurrent& r, const uint8_t* x, const float* x_scales, const int32_t* x_zero_points,
                     const float* h, float* c, float* y) {
  const int64_t n = r.samples, hidden = r.hidden, inputs = r.weight_ih.depth, outputs = r.weight_hh.outputs;
  const Window x_window = rows_of(inputs, r.weight_ih.block_depth), h_window = rows_of(hidden, r.weight_hh.block_depth);
  const int64_t h_count = r.per_row ? n : 1, length = h_count ? n * hidden / h_count : 0;  // rows of h that become codes
  const Parts parts(r, ROWS_AT_ONCE);
  const bool can_fuse = Fused::pays(r);
  static thread_local Scratch given, coded, scaled, shifted;
  float* gates = can_fuse ? nullptr : given.of<float>(parts.longest() * n * outputs);
  uint8_t* h_codes = coded.of<uint8_t>(n * hidden);
  float* h_scales = scaled.of<float>(h_count);
  int32_t* h_zero_points = shifted.of<int32_t>(h_count);
  if ((!gates && !can_fuse) || !h_codes || !h_scales || !h_zero_points) return 0;
  const Rows h_rows{h_zero_points, h_scales, r.per_row ? 1 : INT64_MAX};
  const int threads = threads_of(r);
  Meeting meeting;
  std::atomic<bool> odd{false};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Fused::Room room;
    const Share share(r);
    const TileRegisters registers;
    const int64_t h_first = omp_get_thread_num() * h_count / omp_get_num_threads();
    const int64_t h_end = (omp_get_thread_num() + 1) * h_count / omp_get_num_threads();
    std::optional<Fused> fused;
    if (can_fuse) fused.emplace(r, share, room);
    const bool fuses = fused && fused->there();
    if (fuses) fused->x.rows_have(fused->own_zero_points ? 0 : x_zero_points[0]);
    bool failed = false;
    for (int64_t part = 0; part < parts.count && !failed; ++part) {
      const int64_t first = parts.begin(part), end = parts.begin(part + 1), row = r.per_row ? first * n : 0;
      const Rows x_rows{x_zero_points + row, x_scales + row, r.per_row ? 1 : INT64_MAX};
      const Operands given_x{x + first * n * inputs, nullptr, nullptr, gates, (end - first) * n};
      const Product of_x(r.weight_ih, r.finish_ih, x_window, x_rows, given_x);
      if (gates) share.products(of_x, end - first, false);
      for (int64_t t = first; t < end; ++t) {
        const float* before = t ? y + (t - 1) * n * hidden : h;
        for (int64_t i = h_first; i < h_end; ++i)
          if (!quantize_row(before + i * length, length, r.affine, h_codes + i * length, h_scales[i], h_zero_points[i]))
            odd = true;
        meeting.wait();
        failed = odd;  // every thread sees the same: none sets it before all have met again
        if (failed) break;
        float* step = gates ? gates + (t - first) * n * outputs : nullptr;
        const Operands given_h{h_codes, nullptr, step, step, n};
        const Product of_h(r.weight_hh, r.finish_hh, h_window, h_rows, given_h);
        const auto use = [to = y + t * n * hidden](const Units& units, Floats now) { units.put_to(to, now); };
        if (fuses) {
          fused->h.rows_have(fused->own_zero_points ? 0 : h_zero_points[0]);
          fused->step<true>(meeting, of_x, (t - first) * n, of_h, t % 2, c, use);
        } else if (gates) {
          share.products(of_h, 1, t % 2);
          share.cells(step, outputs, c, use);
        }
        meeting.wait();
      }
    }
  }
  return odd ? -1 : r.steps * n * GATES * hidden * (inputs + hidden);
}

int64_t weight_only_lstm(const Recurrent& r, const float* scales_ih, const float* scales_hh, const float* x,
                         const float* h, float* c, float* y) {
  const int64_t n = r.samples, hidden = r.hidden, inputs = r.weight_ih.depth, outputs = r.weight_hh.outputs;
  const Window x_window = rows_of(inputs, r.weight_ih.block_depth), h_window = rows_of(hidden, r.weight_hh.block_depth);
  const Rows none{nullptr, nullptr, INT64_MAX};
  const Parts parts(r, FLOAT_ROWS_AT_ONCE);
  static thread_local Scratch given, read;
  static thread_local Pieced made_ih, made_hh;
  float* gates = given.of<float>(parts.longest() * n * outputs);
  if (!gates) return 0;
  const Operands some_x{x, nullptr, nullptr, gates, parts.longest() * n}, some_h{h, nullptr, gates, gates, n};
  const Product ih(r.weight_ih, r.finish_ih, x_window, none, some_x), hh(r.weight_hh, r.finish_hh, h_window, none, some_h);
  pieces_of(ih, made_ih), pieces_of(hh, made_hh);
  const Pieced &of_ih = made_ih, &of_hh = made_hh;
  float* ready = nullptr;
  if (r.steps > 1 && !of_hh.in_registers && outputs * hidden <= READY) {
    ready = read.of<float>(outputs * hidden);
    if (!ready) return 0;
    read_back_all(hh, of_hh, ready);
  }
  const int threads = threads_of(r);
  Meeting meeting;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Share share(r);
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t first = parts.begin(part), end = parts.begin(part + 1);
      const Operands given_x{x + first * n * inputs, nullptr, nullptr, gates, (end - first) * n};
      share.float_products(Product(r.weight_ih, r.finish_ih, x_window, none, given_x), end - first, of_ih, scales_ih, nullptr);
      for (int64_t t = first; t < end; ++t) {
        const float* before = t ? y + (t - 1) * n * hidden : h;
        float* step = gates + (t - first) * n * outputs;
        const Operands given_h{before, nullptr, step, step, n};
        share.float_products(Product(r.weight_hh, r.finish_hh, h_window, none, given_h), 1, of_hh, scales_hh, ready);
        share.cells(step, outputs, c, [to = y + t * n * hidden](const Units& units, Floats now) {
          units.put_to(to, now);
        });
        meeting.wait();
      }
    }
  }
  return r.steps * n * GATES * hidden * (inputs + hidden);
}

}  // namespace
