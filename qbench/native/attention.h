// Attention as one operation: scores, softmax and the sum of values, a head of a sample at a time.

namespace {

// Rows of codes as the packed operand of a tile product: [tiles][depth / PACKED][TILE][PACKED] int8 of q - 128, with the
// sum of each of them.
struct PackedRows {
  int8_t* values;
  int32_t* totals;
  int64_t depth;

  // `columns` outputs of `count` products; output j, product k lies at x[j * of_output + k * of_product].
  void pack(const uint8_t* x, int64_t columns, int64_t count, int64_t of_output, int64_t of_product) {
    depth = rounded_up(count, GROUP);
    std::memset(values, 0, rounded_up(columns, TILE) * depth);
    std::memset(totals, 0, rounded_up(columns, TILE) * sizeof(int32_t));
    for (int64_t j = 0; j < columns; ++j) {
      const uint8_t* at = x + j * of_output;
      int8_t* to = values + j / TILE * depth * TILE + j % TILE * PACKED;
      for (int64_t k = 0; k < count; ++k, at += of_product) {
        const int8_t value = int8_t(int32_t(*at) - 128);
        to[k / PACKED * PACKED * TILE + k % PACKED] = value;
        totals[j] += value;
      }
    }
  }
  const int8_t* tile(int64_t index) const { return values + index * depth * TILE; }
};

// Scores of one query to e = exp(score - max), 0 where hidden; returns their sum.
inline float weigh(float* scores, int64_t keys) {
  float lanes[LANES];
  for (int j = 0; j < LANES; ++j) lanes[j] = -INFINITY;
  int64_t i = 0;
  for (; i + LANES <= keys; i += LANES)
    for (int j = 0; j < LANES; ++j) lanes[j] = scores[i + j] > lanes[j] ? scores[i + j] : lanes[j];
  for (; i < keys; ++i) lanes[0] = scores[i] > lanes[0] ? scores[i] : lanes[0];
  float largest = lanes[0];
  for (int j = 1; j < LANES; ++j) largest = std::max(largest, lanes[j]);
  const float shift = largest > -INFINITY ? largest : 0.0f;
  for (int64_t k = 0; k < keys; ++k) {
    const float e = exponential(scores[k] - shift);
    scores[k] = scores[k] == -INFINITY ? 0.0f : e;
  }
  return lane_sum(scores, keys);
}

constexpr int64_t AT_ONCE = 16;  // queries

struct Heads {  // scratch of a thread for one head of a sample
  PackedRows keys, values;
  Code* rows;      // AT_ONCE queries, or rows of probabilities
  float* scores;   // [AT_ONCE][stride]
  int64_t stride;  // of a row of scores: whole tiles

  TileRegisters registers;

  explicit Heads(const Attention& a) {
    static thread_local Scratch k, v, r, s, kt, vt;
    stride = rounded_up(a.keys, TILE);
    keys.values = k.of<int8_t>(stride * rounded_up(a.depth, GROUP));
    keys.totals = kt.of<int32_t>(stride);
    values.values = v.of<int8_t>(rounded_up(a.width, TILE) * rounded_up(a.keys, GROUP));
    values.totals = vt.of<int32_t>(rounded_up(a.width, TILE));
    rows = r.of<Code>(AT_ONCE * rounded_up(std::max(a.depth, a.keys), GROUP) + 64);
    scores = s.of<float>(AT_ONCE * stride);
  }

  // A row of codes as the tile products want them, filled up with 0.
  static void row(const uint8_t* x, int64_t count, int32_t zero_point, Code* out) {
    copied(x, count, int16_t(zero_point), out);
    std::memset(out + count, 0, (rounded_up(count, GROUP) - count) * sizeof(Code));
  }

  // The exact sums of `count` centred rows of codes with zero points `zeros` and `columns` packed outputs, and the sum of
  // each row: use(row, column, how many, sums, row sum).
  template <class Use>
  void product(const PackedRows& packed, int64_t count, const int32_t* zeros, int64_t columns, int64_t depth,
               const Use& use) const {
    int32_t row_sums[AT_ONCE];
    for (int r = 0; r < count; ++r)
      row_sums[r] = sum_of(rows + r * packed.depth, depth) - (CENTRED ? 0 : int32_t(depth) * zeros[r]);
    for (int64_t first = 0; first < columns; first += WIDE * TILE) {
      alignas(64) int32_t sums[AT_ONCE * WIDE * TILE];
      const int wide = int(std::min<int64_t>(WIDE, (columns - first + TILE - 1) / TILE));
      multiply(count, wide, rows, packed.depth, packed.tile(first / TILE), packed.depth * TILE, packed.depth, sums);
      const int64_t width = std::min<int64_t>(wide * TILE, columns - first);
      for (int r = 0; r < count; ++r) {
        int32_t* of_row = sums + r * wide * TILE;
        if (!CENTRED)
          for (int64_t j = 0; j < width; ++j)
            of_row[j] = int32_t(uint32_t(of_row[j]) - uint32_t(zeros[r]) * uint32_t(packed.totals[first + j]));
        use(r, first, width, of_row, row_sums[r]);
      }
    }
  }
};

// (q - 128) sums to centred ones: sum - (zero - 128) * row sum. The difference is exact, steps of it may wrap.
inline int32_t centred_sum(int32_t sum, int32_t zero, int32_t row_sum) {
  return int32_t(uint32_t(sum) - uint32_t(zero - 128) * uint32_t(row_sum));
}

inline void masked(const Attention& a, int64_t head, int64_t query, float* scores) {
  if (a.mask) {
    const float* mask = a.mask + (a.mask_shared ? 0 : head * a.queries * a.keys) + query * a.keys;
    for (int64_t k = 0; k < a.keys; ++k) scores[k] += mask[k];
  }
  if (a.causal)
    for (int64_t k = query + 1; k < a.keys; ++k) scores[k] = -INFINITY;
}

int64_t attention(const Attention& a, const uint8_t* q, const uint8_t* k, const uint8_t* v, uint8_t* y) {
  const Codes codes(a.zero_point, a.q_min, a.q_max);
  int32_t q_zeros[AT_ONCE], p_zeros[AT_ONCE] = {};
  std::fill(q_zeros, q_zeros + AT_ONCE, a.q_zero_point);
  const int threads = threads_for(a.heads * a.queries * a.keys * (a.depth + a.width), WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    Heads h(a);
    h.keys.pack(k + head * a.keys * a.depth, a.keys, a.depth, a.depth, 1);
    h.values.pack(v + head * a.keys * a.width, a.width, a.keys, 1, a.width);
    for (int64_t first = 0; first < a.queries; first += AT_ONCE) {
      const int64_t count = std::min(AT_ONCE, a.queries - first);
      for (int64_t r = 0; r < count; ++r)
        h.row(q + (head * a.queries + first + r) * a.depth, a.depth, a.q_zero_point, h.rows + r * h.keys.depth);
      h.product(h.keys, count, q_zeros, a.keys, a.depth,
                [&](int r, int64_t column, int64_t width, const int32_t* sums, int32_t row_sum) {
                  float* scores = h.scores + r * h.stride + column;
                  for (int64_t j = 0; j < width; ++j)
                    scores[j] = float(centred_sum(sums[j], a.k_zero_point, row_sum)) * a.m_scores;
                });
      for (int64_t r = 0; r < count; ++r) {
        float* scores = h.scores + r * h.stride;
        masked(a, head, first + r, scores);
        const float part = 255.0f / weigh(scores, a.keys);
        Code* p = h.rows + r * h.values.depth;
        for (int64_t j = 0; j < a.keys; ++j) p[j] = Code(rounded(scores[j] * part, 0.0f, 255.0f));
        std::memset(p + a.keys, 0, (h.values.depth - a.keys) * sizeof(Code));
      }
      h.product(h.values, count, p_zeros, a.width, a.keys,
                [&](int r, int64_t column, int64_t width, const int32_t* sums, int32_t row_sum) {
                  uint8_t* out = y + (head * a.queries + first + r) * a.width + column;
                  encode(codes, 0, width, out, [sums, zero = a.v_zero_point, row_sum, m = a.m](int64_t j) {
                    return float(centred_sum(sums[j], zero, row_sum)) * m;
                  });
                });
    }
  }
  return a.heads * a.queries * a.keys * (a.depth + a.width);
}

// The index of a row's scale: rows of a head may have one each, one together, or all heads one.
inline int64_t scale_of(int64_t head, int64_t row, int64_t rows, int32_t sharing) {
  return sharing == EACH_ROW ? head * rows + row : sharing == EACH_HEAD ? head : 0;
}

// p = e / sum, times the scale of each value where `value_scales` are given: float32 [heads][queries][keys].
int64_t probabilities(const Attention& a, const Quantized& q, const Quantized& k, const float* value_scales, float* y) {
  const int threads = threads_for(a.heads * a.queries * a.keys * a.depth, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    Heads h(a);
    h.keys.pack(k.codes + head * a.keys * a.depth, a.keys, a.depth, a.depth, 1);
    for (int64_t first = 0; first < a.queries; first += AT_ONCE) {
      const int64_t count = std::min(AT_ONCE, a.queries - first);
      int32_t zeros[AT_ONCE];
      for (int64_t r = 0; r < count; ++r) {
        zeros[r] = q.zero_points[scale_of(head, first + r, a.queries, q.sharing)];
        h.row(q.codes + (head * a.queries + first + r) * a.depth, a.depth, zeros[r], h.rows + r * h.keys.depth);
      }
      h.product(h.keys, count, zeros, a.keys, a.depth,
                [&](int r, int64_t column, int64_t width, const int32_t* sums, int32_t row_sum) {
                  const float q_scale = q.scales[scale_of(head, first + r, a.queries, q.sharing)];
                  float* out = y + (head * a.queries + first + r) * a.keys + column;
                  for (int64_t j = 0; j < width; ++j) {
                    const int64_t own = scale_of(head, column + j, a.keys, k.sharing);
                    out[j] = float(centred_sum(sums[j], k.zero_points[own], row_sum)) *
                             (q_scale * k.scales[own] * a.m_scores);
                  }
                });
      for (int64_t r = 0; r < count; ++r) {
        float* out = y + (head * a.queries + first + r) * a.keys;
        masked(a, head, first + r, out);
        const float sum = std::max(weigh(out, a.keys), 1.0f);
        for (int64_t j = 0; j < a.keys; ++j) out[j] /= sum;
        if (value_scales)
          for (int64_t j = 0; j < a.keys; ++j) out[j] *= value_scales[head * a.keys + j];
      }
    }
  }
  return a.heads * a.queries * a.keys * a.depth;
}

// f32(sum of p v) * (s_p * s_v): float32 [heads][queries][width]. Where the scales of v lie in p already, v.scales is
// null, and each value has a zero point of its own.
int64_t weighted_values(const Attention& a, const Quantized& p, const Quantized& v, float* y) {
  const int threads = threads_for(a.heads * a.queries * a.keys * a.width, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    Heads h(a);
    h.values.pack(v.codes + head * a.keys * a.width, a.width, a.keys, 1, a.width);
    for (int64_t first = 0; first < a.queries; first += AT_ONCE) {
      const int64_t count = std::min(AT_ONCE, a.queries - first);
      int32_t zeros[AT_ONCE], corrections[AT_ONCE];  // sum of p (zero point - 128) over the values
      for (int64_t r = 0; r < count; ++r) {
        const uint8_t* codes = p.codes + (head * a.queries + first + r) * a.keys;
        zeros[r] = p.zero_points[scale_of(head, first + r, a.queries, p.sharing)];
        h.row(codes, a.keys, zeros[r], h.rows + r * h.values.depth);
        uint32_t correction = 0;
        for (int64_t j = 0; j < a.keys; ++j)
          correction += uint32_t((codes[j] - zeros[r]) * (v.zero_points[scale_of(head, j, a.keys, v.sharing)] - 128));
        corrections[r] = int32_t(correction);
      }
      h.product(h.values, count, zeros, a.width, a.keys,
                [&](int r, int64_t column, int64_t width, const int32_t* sums, int32_t) {
                  const float m = p.scales[scale_of(head, first + r, a.queries, p.sharing)] *
                                  (v.scales ? v.scales[scale_of(head, 0, a.keys, v.sharing)] : 1.0f);
                  float* out = y + (head * a.queries + first + r) * a.width + column;
                  for (int64_t j = 0; j < width; ++j)
                    out[j] = float(int32_t(uint32_t(sums[j]) - uint32_t(corrections[r]))) * m;
                });
    }
  }
  return a.heads * a.queries * a.keys * a.width;
}

}  // namespace
