// Gates of an LSTM layer out of the exact sums of both of its products, in registers: no gate is ever written.
//
// For weights of one block, and so many samples that the weight of x need not be read for several steps at once.

namespace {

constexpr int64_t GATES = 4;
static_assert(GATES % WIDE == 0, "a tile of units has whole blocks of tiles of outputs");
constexpr int64_t WORTH_FUSING = 8;  // samples
constexpr int64_t ROWS_A_TURN = 32;  // samples whose sums stay in the first-level cache

// Exact sums of rows for a tile of units: [GATES / WIDE][rows][WIDE * TILE].
struct UnitSums {
  int32_t* first;
  int64_t rows;

  UnitSums(Scratch& scratch, int64_t count) : rows(rounded_up(count, WHOLE)) { first = scratch.of<int32_t>(GATES * TILE * rows); }
  int32_t* of(int64_t gate, int64_t row) const { return first + (gate / WIDE * rows + row) * WIDE * TILE + gate % WIDE * TILE; }
};

// One of the two products of a layer's outputs: what makes its sums a part of their gates.
struct Addend {
  struct Room {
    Scratch gathered, summed, totalled, started, ended;
  };
  struct Panel {
    RowsAt at;
    int64_t count;
    const int32_t *row_sums, *zero_points;  // null: none, and what all rows have
  };

  const Weight& weight;
  const Finish& finish;
  Room& room;
  int64_t count;  // outputs
  int32_t *total, *start;  // what a zero point of 1 takes away; what a sum begins with
  float* last;             // what a gate ends with
  bool ready = false;
  int32_t zero_point = 0;

  Addend(const Weight& w, const Finish& f, Room& scratch, int64_t outputs)
      : weight(w), finish(f), room(scratch), count(outputs) {
    total = room.totalled.of<int32_t>(count), start = room.started.of<int32_t>(count), last = room.ended.of<float>(count);
    if (!there()) return;
    for (int64_t j = 0; j < count; ++j) {
      last[j] = finish.last ? finish.last[j] : 0.0f;
      const uint32_t zeros = weight.zero_points ? uint32_t(weight.depth) * uint32_t(weight.zero_points[j]) : 0;
      total[j] = CENTRED ? 0 : int32_t(uint32_t(weight.totals[j]) - zeros);
    }
  }

  bool there() const { return total && start && last; }

  // For the next rows, all of which have this zero point (0 where each has its own).
  void rows_have(int32_t zero) {
    if (ready && zero == zero_point) return;
    ready = true, zero_point = zero;
    for (int64_t j = 0; j < count; ++j)
      start[j] = int32_t((finish.bias ? uint32_t(finish.bias[j]) : 0) - uint32_t(total[j]) * uint32_t(zero));
  }

  // Rows of x or h, each with a zero point of its own or not; none without memory.
  Panel panel(const Product& p, int64_t row, int64_t rows, bool own_zero_points) const {
    const RowsAt at = p.rows_at(row, rows, 0, room.gathered);
    int32_t* row_sums = weight.zero_points ? room.summed.of<int32_t>(rows) : nullptr;
    if (!at.first || (weight.zero_points && !row_sums)) return {at, 0, nullptr, nullptr};
    if (row_sums) p.row_sums(at.first, at.stride, rows, 0, row_sums);
    return {at, rows, row_sums, own_zero_points && !CENTRED ? p.rows.zero_points + row : nullptr};
  }

  // Sums of a panel for a tile of units.
  void multiply_into(const UnitSums& sums, const Product& p, const Panel& panel, int64_t tile) const {
    const int64_t depth = p.packed_depth_of(0), outputs = tile * GATES * TILE;
    for (int64_t gate = 0; gate < GATES; gate += WIDE)
      multiply(panel.count, WIDE, panel.at, p.tile_of(0, 0, tile * GATES + gate), depth * TILE, depth, sums.of(gate, 0));
    if (panel.zero_points) subtract(sums, panel.count, total + outputs, panel.zero_points);
    if (panel.row_sums) subtract(sums, panel.count, weight.zero_points + outputs, panel.row_sums);
  }

  // From the sums of each row its own factor times that of each output.
  static void subtract(const UnitSums& sums, int64_t rows, const int32_t* of_outputs, const int32_t* of_rows) {
    for (int64_t gate = 0; gate < GATES; ++gate) {
      const Wrapping factor = wrapping_at(of_outputs + gate * TILE);
      for (int64_t r = 0; r < rows; ++r) copy_to(sums.of(gate, r), wrapping_at(sums.of(gate, r)) - factor * uint32_t(of_rows[r]));
    }
  }

  // TILE sums of a row, of the outputs from the `j`th on, as what they add to their gates.
  template <bool SCALED>
  struct Terms {
    const int32_t* start;
    const float *multiplier, *scales;
    const int64_t step;  // from the scale of a row to that of the next

    Terms(const Addend& of, const Rows& rows)
        : start(of.start), multiplier(of.finish.multiplier), scales(rows.scales), step(rows.pixels == 1) {}

    Floats operator()(const int32_t* sums, int64_t j, int64_t row) const {
      const Floats m = lanes_at(multiplier + j), sum = to_floats(as_ints(wrapping_at(sums) + wrapping_at(start + j)));
      if constexpr (SCALED) return sum * (scales[step * row] * m);
      return sum * m;
    }
  };
};

}  // namespace
