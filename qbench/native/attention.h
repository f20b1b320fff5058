// Attention as one operation: scores, softmax and the sum of values, a head of a sample at a time.

namespace {

// Rows of codes as the packed operand of a tile product: [tiles][pairs][TILE][2] int8 of q - 128, so that the centred
// product is sum a (q - 128) - (zero point - 128) sum a.
struct PackedRows {
  int8_t* values;
  int64_t pairs;

  // `columns` outputs of `depth` products; output j, product k lies at x[j * of_output + k * of_product].
  void pack(const uint8_t* x, int64_t columns, int64_t depth, int64_t of_output, int64_t of_product) {
    pairs = (depth + 1) / 2;
    std::memset(values, 0, rounded_up(columns, TILE) * 2 * pairs);
    for (int64_t j = 0; j < columns; ++j) {
      const uint8_t* at = x + j * of_output;
      int8_t* to = values + (j / TILE * pairs * TILE + j % TILE) * 2;
      for (int64_t k = 0; k < depth; ++k, at += of_product) {
        to[k % 2] = int8_t(int32_t(*at) - 128);
        to += k % 2 * 2 * TILE;
      }
    }
  }
  const int8_t* tile(int64_t index) const { return values + index * pairs * 2 * TILE; }
};

inline int32_t sum_of(const int16_t* a, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i];
  return sum;
}

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

struct Heads {  // scratch of a thread for one head of a sample
  PackedRows keys, values;
  int16_t* rows;   // ROWS queries, or ROWS rows of probabilities
  float* scores;   // [ROWS][stride]
  int64_t stride;  // of a row of scores or probabilities: whole tiles

  explicit Heads(const Attention& a) {
    static thread_local Scratch k, v, r, s;
    stride = rounded_up(a.keys, TILE);
    keys.values = k.of<int8_t>(stride * rounded_up(a.depth, 2));
    values.values = v.of<int8_t>(rounded_up(a.width, TILE) * rounded_up(a.keys, 2));
    rows = r.of<int16_t>(ROWS * std::max(rounded_up(a.depth, 2), stride));
    scores = s.of<float>(ROWS * stride);
  }

  // The exact sums of `count` rows [count][row_stride] with `columns` packed outputs, `use(row, column, sum)` for each.
  template <class Use>
  void multiply(const PackedRows& packed, int64_t row_stride, int count, int64_t columns, int64_t depth,
                const Use& use) const {
    int32_t row_sums[ROWS];
    for (int r = 0; r < count; ++r) row_sums[r] = sum_of(rows + r * row_stride, depth);
    for (int64_t first = 0; first < columns; first += TILE) {
      alignas(32) int32_t sums[ROWS * TILE];
      MULTIPLY[count](rows, row_stride, packed.tile(first / TILE), packed.pairs, sums);
      const int64_t width = std::min<int64_t>(TILE, columns - first);
      for (int r = 0; r < count; ++r) use(r, first, width, sums + r * TILE, row_sums[r]);
    }
  }
};

// (q - 128) sums to centred ones: sum - (zero - 128) * row sum. The difference is exact, steps of it may wrap.
inline int32_t centred_sum(int32_t sum, int32_t zero, int32_t row_sum) {
  return int32_t(uint32_t(sum) - uint32_t(zero - 128) * uint32_t(row_sum));
}

// A row of centred codes, filled up with a zero to an even length.
inline void centred_row(const uint8_t* x, int64_t count, int32_t zero_point, int16_t* out) {
  centre(x, count, int16_t(zero_point), out);
  if (count % 2) out[count] = 0;
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
  const int threads = threads_for(a.heads * a.queries * a.keys * (a.depth + a.width), WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    Heads h(a);
    const int64_t deep = rounded_up(a.depth, 2), long_row = rounded_up(a.keys, 2);
    h.keys.pack(k + head * a.keys * a.depth, a.keys, a.depth, a.depth, 1);
    h.values.pack(v + head * a.keys * a.width, a.width, a.keys, 1, a.width);
    for (int64_t first = 0; first < a.queries; first += ROWS) {
      const int count = int(std::min<int64_t>(ROWS, a.queries - first));
      for (int r = 0; r < count; ++r)
        centred_row(q + (head * a.queries + first + r) * a.depth, a.depth, a.q_zero_point, h.rows + r * deep);
      h.multiply(h.keys, deep, count, a.keys, a.depth,
                 [&](int r, int64_t column, int64_t width, const int32_t* sums, int32_t row_sum) {
                   float* scores = h.scores + r * h.stride + column;
                   for (int64_t j = 0; j < width; ++j)
                     scores[j] = float(centred_sum(sums[j], a.k_zero_point, row_sum)) * a.m_scores;
                 });
      for (int r = 0; r < count; ++r) {
        float* scores = h.scores + r * h.stride;
        masked(a, head, first + r, scores);
        const float part = 255.0f / weigh(scores, a.keys);
        int16_t* p = h.rows + r * long_row;
        for (int64_t j = 0; j < a.keys; ++j) p[j] = int16_t(rounded(scores[j] * part, 0.0f, 255.0f));
        if (a.keys % 2) p[a.keys] = 0;
      }
      h.multiply(h.values, long_row, count, a.width, a.keys,
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
    const int64_t deep = rounded_up(a.depth, 2);
    h.keys.pack(k.codes + head * a.keys * a.depth, a.keys, a.depth, a.depth, 1);
    for (int64_t first = 0; first < a.queries; first += ROWS) {
      const int count = int(std::min<int64_t>(ROWS, a.queries - first));
      for (int r = 0; r < count; ++r)
        centred_row(q.codes + (head * a.queries + first + r) * a.depth, a.depth,
                    q.zero_points[scale_of(head, first + r, a.queries, q.sharing)], h.rows + r * deep);
      h.multiply(h.keys, deep, count, a.keys, a.depth,
                 [&](int r, int64_t column, int64_t width, const int32_t* sums, int32_t row_sum) {
                   const float q_scale = q.scales[scale_of(head, first + r, a.queries, q.sharing)];
                   float* out = y + (head * a.queries + first + r) * a.keys + column;
                   for (int64_t j = 0; j < width; ++j) {
                     const int64_t own = scale_of(head, column + j, a.keys, k.sharing);
                     out[j] = float(centred_sum(sums[j], k.zero_points[own], row_sum)) *
                              (q_scale * k.scales[own] * a.m_scores);
                   }
                 });
      for (int r = 0; r < count; ++r) {
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
    const int64_t long_row = rounded_up(a.keys, 2);
    h.values.pack(v.codes + head * a.keys * a.width, a.width, a.keys, 1, a.width);
    for (int64_t first = 0; first < a.queries; first += ROWS) {
      const int count = int(std::min<int64_t>(ROWS, a.queries - first));
      int32_t corrections[ROWS];  // sum of p (zero point - 128) over the values
      for (int r = 0; r < count; ++r) {
        int16_t* row = h.rows + r * long_row;
        centred_row(p.codes + (head * a.queries + first + r) * a.keys, a.keys,
                    p.zero_points[scale_of(head, first + r, a.queries, p.sharing)], row);
        uint32_t correction = 0;
        for (int64_t j = 0; j < a.keys; ++j)
          correction += uint32_t(row[j] * (v.zero_points[scale_of(head, j, a.keys, v.sharing)] - 128));
        corrections[r] = int32_t(correction);
      }
      h.multiply(h.values, long_row, count, a.width, a.keys,
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
