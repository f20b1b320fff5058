// Attention as one operation: scores, softmax and the sum of values, a head of a sample at a time.

namespace {

// Rows of codes as the packed operand of a tile product: [tiles][depth / PACKED][TILE][PACKED] int8 of q - 128, with the
// sum of each of them.
struct PackedRows {
  int8_t* values;
  int32_t* totals;
  int64_t depth;

  // Keys: `columns` outputs `stride` apart, the products of each side by side.
  void pack_rows(const uint8_t* first, int64_t columns, int64_t count, int64_t stride) {
    begin(columns, count);
    for (int64_t j = 0; j < columns; j += TILE) {
      const int64_t width = std::min<int64_t>(TILE, columns - j);
      int8_t* to = values + j / TILE * depth * TILE;
      int64_t k = 0;
#if defined(QB_AVX512)
      if (width == TILE)
        for (; k + 16 <= count; k += 16) transpose(first + j * stride + k, stride, to + k * TILE);
#endif
      for (int64_t c = 0; c < width; ++c)
        for (int64_t i = k; i < count; ++i)
          to[i / PACKED * PACKED * TILE + c * PACKED + i % PACKED] = int8_t(first[(j + c) * stride + i] ^ 0x80);
    }
    add_up(columns);
  }

  // Values: `count` products `stride` apart of `columns` outputs side by side.
  void pack_columns(const uint8_t* x, int64_t columns, int64_t count, int64_t stride) {
    begin(columns, count);
    for (int64_t k = 0; k < count; k += PACKED) {
      const int64_t there = std::min(PACKED, count - k);
      for (int64_t j = 0; j < columns; j += TILE) {
        const int64_t width = std::min<int64_t>(TILE, columns - j);
        int8_t* to = values + j / TILE * depth * TILE + k * TILE;
#if defined(QB_AVX512)
        if (there == PACKED) {
          const uint8_t* at = x + k * stride + j;
          const __mmask16 mask = __mmask16((1u << width) - 1);
          const __m128i a = _mm_maskz_loadu_epi8(mask, at), b = _mm_maskz_loadu_epi8(mask, at + stride);
          const __m128i c = _mm_maskz_loadu_epi8(mask, at + 2 * stride), d = _mm_maskz_loadu_epi8(mask, at + 3 * stride);
          const __m128i ab = _mm_unpacklo_epi8(a, b), AB = _mm_unpackhi_epi8(a, b);
          const __m128i cd = _mm_unpacklo_epi8(c, d), CD = _mm_unpackhi_epi8(c, d);
          const __m128i flip = _mm_set1_epi8(char(0x80));
          __m128i* lines = reinterpret_cast<__m128i*>(to);
          _mm_storeu_si128(lines, _mm_xor_si128(flip, _mm_unpacklo_epi16(ab, cd)));
          _mm_storeu_si128(lines + 1, _mm_xor_si128(flip, _mm_unpackhi_epi16(ab, cd)));
          _mm_storeu_si128(lines + 2, _mm_xor_si128(flip, _mm_unpacklo_epi16(AB, CD)));
          _mm_storeu_si128(lines + 3, _mm_xor_si128(flip, _mm_unpackhi_epi16(AB, CD)));
          continue;
        }
#endif
        for (int64_t i = 0; i < there; ++i)
          for (int64_t c = 0; c < width; ++c) to[c * PACKED + i] = int8_t(x[(k + i) * stride + j + c] ^ 0x80);
      }
    }
    add_up(columns);
  }

#if defined(QB_AVX512)
  // 16 bytes of each of TILE rows, four of each side by side.
  static void transpose(const uint8_t* x, int64_t stride, int8_t* to) {
    __m512i rows[4];  // i, i + 4, i + 8 and i + 12
    for (int i = 0; i < 4; ++i, x += stride) {
      const auto at = [=](int64_t row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + row * stride)); };
      rows[i] = _mm512_castsi128_si512(at(0));
      rows[i] = _mm512_inserti32x4(rows[i], at(4), 1);
      rows[i] = _mm512_inserti32x4(rows[i], at(8), 2);
      rows[i] = _mm512_xor_si512(_mm512_set1_epi8(char(0x80)), _mm512_inserti32x4(rows[i], at(12), 3));
    }
    const __m512i ab = _mm512_unpacklo_epi32(rows[0], rows[1]), AB = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i cd = _mm512_unpacklo_epi32(rows[2], rows[3]), CD = _mm512_unpackhi_epi32(rows[2], rows[3]);
    const __m512i lines[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                              _mm512_unpacklo_epi64(AB, CD), _mm512_unpackhi_epi64(AB, CD)};
    std::memcpy(to, lines, sizeof lines);
  }
#endif

  void begin(int64_t columns, int64_t count) {
    depth = rounded_up(count, GROUP);
    std::memset(values, 0, rounded_up(columns, TILE) * depth);
  }

  void add_up(int64_t columns) {
    for (int64_t tile = 0; tile < (columns + TILE - 1) / TILE; ++tile) {
      const int8_t* at = values + tile * depth * TILE;
      int32_t* total = totals + tile * TILE;
#if defined(QB_AVX512)
      __m512i sums = _mm512_setzero_si512();
      for (int64_t k = 0; k < depth; k += PACKED) add_products(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(at + k * TILE));
      _mm512_storeu_si512(total, sums);
#else
      std::memset(total, 0, TILE * sizeof(int32_t));
      for (int64_t k = 0; k < depth; k += PACKED, at += PACKED * TILE)
        for (int j = 0; j < TILE; ++j)
          for (int64_t i = 0; i < PACKED; ++i) total[j] += at[j * PACKED + i];
#endif
    }
  }

  const int8_t* tile(int64_t index) const { return values + index * depth * TILE; }
};

// Scores of `count` queries, each filled up with -infinity to whole tiles, to e = exp(score - max), 0 where hidden, and their
// sums. First every maximum, then every sum: what a row waits for is not waited for by the next one.
inline void weigh(float* scores, int64_t stride, int64_t count, float* sums) {
  float* const shifts = sums;
  for (int64_t r = 0; r < count; ++r) {
    const float* row = scores + r * stride;
    Floats most = lanes_at(row);
    for (int64_t k = TILE; k < stride; k += TILE) most = higher_of(lanes_at(row + k), most);
    const float largest = largest_of(most);
    shifts[r] = largest > -INFINITY ? largest : 0.0f;
  }
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r * stride;
    const auto raised = [shift = shifts[r]](auto score) {
      return where_not(score, -INFINITY, exponential_below(score - shift));
    };
    Floats sum = {};
    int64_t k = 0;
    const auto next = [&](auto scores) {
      const auto e = raised(scores);
      copy_to(row + k, e);
      add_tiles(sum, e);
      k += int64_t(sizeof e / sizeof *row);
    };
    while (k + MANY <= stride) next(copied_from<ManyFloats>(row + k));
    while (k + 2 * TILE <= stride) next(copied_from<TwoFloats>(row + k));
    while (k < stride) next(lanes_at(row + k));
    sums[r] = folded(sum);
  }
}

// TILE codes with zero point 0 as a panel holds them.
inline void put_codes(Bytes codes, uint8_t* out) { put(codes, TILE, out); }
inline void put_codes(Bytes codes, int16_t* out) { copied(reinterpret_cast<const uint8_t*>(&codes), TILE, 0, out); }

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

  bool complete() const { return keys.values && keys.totals && values.values && values.totals && rows && scores; }

  // A row of codes as the tile products want them, filled up with 0.
  static void row(const uint8_t* x, int64_t count, int32_t zero_point, Code* out) {
    copied(x, count, int16_t(zero_point), out);
    std::memset(out + count, 0, (rounded_up(count, GROUP) - count) * sizeof(Code));
  }

  // The exact sums of `count` centred rows of codes with zero points `zeros` and `columns` packed outputs:
  // use(row, the sum of the row)(first column, TILE sums).
  template <class Use>
  void product(const PackedRows& packed, int64_t count, const int32_t* zeros, int64_t columns, int64_t depth,
               const Use& use) const {
    const int32_t* const totals = packed.totals;
    int32_t row_sums[AT_ONCE];
    for (int r = 0; r < count; ++r)
      row_sums[r] = sum_of(rows + r * packed.depth, depth) - (CENTRED ? 0 : int32_t(depth) * zeros[r]);
    for (int64_t first = 0; first < columns; first += WIDE * TILE) {
      alignas(64) int32_t sums[AT_ONCE * WIDE * TILE];
      const int wide = int(std::min<int64_t>(WIDE, (columns - first + TILE - 1) / TILE));
      multiply(count, wide, {rows, packed.depth, nullptr}, packed.tile(first / TILE), packed.depth * TILE, packed.depth, sums);
      for (int r = 0; r < count; ++r) {
        const auto use_sums = use(r, row_sums[r]);
        for (int n = 0; n < wide; ++n) {
          Wrapping sum = wrapping_at(sums + (r * wide + n) * TILE);
          if (!CENTRED) sum -= wrapping_at(totals + first + n * TILE) * uint32_t(zeros[r]);
          use_sums(first + n * TILE, sum);
        }
      }
    }
  }
};

// What the zero points of packed codes add to the sums of a row: sums less it are exact, steps of it may wrap.
inline uint32_t excess(int32_t zero_point, int32_t row_sum) { return uint32_t(zero_point - 128) * uint32_t(row_sum); }
inline Wrapping excess(Ints zero_points, int32_t row_sum) { return as_wrapping(zero_points - 128) * uint32_t(row_sum); }

// Adds the mask, and hides what is after the query and behind the last key.
inline void masked(const Attention& a, int64_t head, int64_t query, int64_t stride, float* scores) {
  if (a.mask) {
    const float* mask = a.mask + (a.mask_shared ? 0 : head * a.queries * a.keys) + query * a.keys;
    for (int64_t k = 0; k < a.keys; ++k) scores[k] += mask[k];
  }
  const int64_t seen = a.causal ? std::min(a.keys, query + 1) : a.keys;
  for (int64_t k = seen; k < stride; ++k) scores[k] = -INFINITY;
}

// Where a head begins.
inline int64_t begin_of(const Attention& a, const HeadStrides& strides, int64_t head) {
  return head / a.each * strides.sample + head % a.each * strides.head;
}

int64_t attention(const Attention& a, const uint8_t* q, const uint8_t* k, const uint8_t* v, uint8_t* y) {
  const float low = float(a.q_min - a.zero_point), high = float(a.q_max - a.zero_point);
  int32_t q_zeros[AT_ONCE], p_zeros[AT_ONCE] = {};
  std::fill(q_zeros, q_zeros + AT_ONCE, a.q_zero_point);
  const int threads = threads_for(a.heads * a.queries * a.keys * (a.depth + a.width), WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    Heads h(a);
    if (!h.complete()) continue;
    const uint8_t* queries = q + begin_of(a, a.q, head);
    uint8_t* results = y + begin_of(a, a.y, head);
    h.keys.pack_rows(k + begin_of(a, a.k, head), a.keys, a.depth, a.k.row);
    h.values.pack_columns(v + begin_of(a, a.v, head), a.width, a.keys, a.v.row);
    for (int64_t first = 0; first < a.queries; first += AT_ONCE) {
      const int64_t count = std::min(AT_ONCE, a.queries - first);
      float e_sums[AT_ONCE];
      for (int64_t r = 0; r < count; ++r)
        h.row(queries + (first + r) * a.q.row, a.depth, a.q_zero_point, h.rows + r * h.keys.depth);
      h.product(h.keys, count, q_zeros, a.keys, a.depth, [&](int r, int32_t row_sum) {
        float* const scores = h.scores + r * h.stride;
        return [=, m = a.m_scores, less = excess(a.k_zero_point, row_sum)](int64_t column, Wrapping sums) {
          set_lanes(scores + column, to_floats(as_ints(sums - less)) * m);
        };
      });
      for (int64_t r = 0; r < count; ++r) masked(a, head, first + r, h.stride, h.scores + r * h.stride);
      weigh(h.scores, h.stride, count, e_sums);
      for (int64_t r = 0; r < count; ++r) {
        const float *scores = h.scores + r * h.stride, part = 255.0f / e_sums[r];
        Code* p = h.rows + r * h.values.depth;
        int64_t j = 0;
#if defined(QB_AVX512)
        const auto ints = [=, &j](int64_t n) { return _mm512_cvtps_epi32(__m512(lanes_at(scores + j + n * TILE) * part)); };
        for (; j + 64 <= h.stride; j += 64)  // NaN becomes the lowest int32, and then 0
          _mm512_storeu_si512(p + j, in_order(_mm512_packus_epi16(_mm512_packs_epi32(ints(0), ints(1)),
                                                                  _mm512_packs_epi32(ints(2), ints(3)))));
#endif
        for (; j < h.stride; j += TILE)  // the rows have room for whole tiles
          put_codes(to_bytes(rounded_lanes(lanes_at(scores + j) * part, 0.0f, 255.0f)), p + j);
        if (h.values.depth > h.stride) std::memset(p + h.stride, 0, (h.values.depth - h.stride) * sizeof(Code));
      }
      h.product(h.values, count, p_zeros, a.width, a.keys, [&](int r, int32_t row_sum) {
        uint8_t* const result = results + (first + r) * a.y.row;
        return [=, &a, less = excess(a.v_zero_point, row_sum)](int64_t column, Wrapping sums) {
          const Ints codes = rounded_lanes(to_floats(as_ints(sums - less)) * a.m, low, high) + a.zero_point;
          put(to_bytes(codes), a.width - column, result + column);
        };
      });
    }
  }
  return a.heads * a.queries * a.keys * (a.depth + a.width);
}

// The index of a row's scale: rows of a head may have one each, one together, or all heads one.
inline int64_t scale_of(int64_t head, int64_t row, int64_t rows, int32_t sharing) {
  return sharing == EACH_ROW ? head * rows + row : sharing == EACH_HEAD ? head : 0;
}

// Scores of `count` queries from `first` on of a head to probabilities, in their place: e / sum, times the scale of each
// value where `value_scales` are given.
inline void weigh_keys(const Attention& a, const Quantized& q, const Quantized& k, const float* value_scales, int64_t head,
                       int64_t first, int64_t count, const Heads& h) {
  int32_t zeros[AT_ONCE];
  for (int64_t r = 0; r < count; ++r) {
    zeros[r] = q.zero_points[scale_of(head, first + r, a.queries, q.sharing)];
    h.row(q.codes + (head * a.queries + first + r) * a.depth, a.depth, zeros[r], h.rows + r * h.keys.depth);
  }
  h.product(h.keys, count, zeros, a.keys, a.depth, [&](int r, int32_t row_sum) {
    const float q_scale = q.scales[scale_of(head, first + r, a.queries, q.sharing)];
    return [=, &a, &k, scores = h.scores + r * h.stride](int64_t column, Wrapping sums) {
      const int64_t own = scale_of(head, column, a.keys, k.sharing), left = a.keys - column;
      const bool each = k.sharing == EACH_ROW;
      const Floats k_scales = each ? taken<Floats>(k.scales + own, left) : Floats{} + k.scales[own];
      const Ints k_zeros = each ? taken<Ints>(k.zero_points + own, left) : Ints{} + k.zero_points[own];
      set_lanes(scores + column,
                to_floats(as_ints(sums - excess(k_zeros, row_sum))) * (q_scale * k_scales * a.m_scores));
    };
  });
  float sums[AT_ONCE];
  for (int64_t r = 0; r < count; ++r) masked(a, head, first + r, h.stride, h.scores + r * h.stride);
  weigh(h.scores, h.stride, count, sums);
  for (int64_t r = 0; r < count; ++r) {
    float* scores = h.scores + r * h.stride;
    const float sum = std::max(sums[r], 1.0f);
    for (int64_t j = 0; j < a.keys; j += TILE) {
      Floats p = lanes_at(scores + j) / sum;
      if (value_scales) p *= taken<Floats>(value_scales + head * a.keys + j, a.keys - j);
      set_lanes(scores + j, p);
    }
  }
}

// f32(sum of p v) * (s_p * s_v) for `count` queries: codes, scales and zero points of p lie row by row from these on.
inline void add_values(const Attention& a, const uint8_t* codes, const float* scales, const int32_t* zeros,
                       const Quantized& v, int64_t head, int64_t count, const Heads& h, float* y) {
  const int32_t* v_zeros = v.zero_points + scale_of(head, 0, a.keys, v.sharing);
  uint32_t corrections[AT_ONCE];  // sum of p (zero point - 128) over the values
  for (int64_t r = 0; r < count; ++r, codes += a.keys) {
    h.row(codes, a.keys, zeros[r], h.rows + r * h.values.depth);
    uint32_t correction = 0;
    if (v.sharing == EACH_ROW)
      for (int64_t j = 0; j < a.keys; ++j) correction += uint32_t((codes[j] - zeros[r]) * (v_zeros[j] - 128));
    else
      for (int64_t j = 0; j < a.keys; ++j) correction += uint32_t(codes[j] - zeros[r]) * uint32_t(v_zeros[0] - 128);
    corrections[r] = correction;
  }
  const float v_scale = v.scales ? v.scales[scale_of(head, 0, a.keys, v.sharing)] : 1.0f;
  h.product(h.values, count, zeros, a.width, a.keys, [&](int r, int32_t) {
    return [=, m = scales[r] * v_scale, less = corrections[r], result = y + r * a.width](int64_t column, Wrapping sums) {
      put(to_floats(as_ints(sums - less)) * m, a.width - column, result + column);
    };
  });
}

// Probabilities float32 [heads][queries][keys].
int64_t probabilities(const Attention& a, const Quantized& q, const Quantized& k, float* y) {
  const int threads = threads_for(a.heads * a.queries * a.keys * a.depth, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    Heads h(a);
    if (!h.complete()) continue;
    h.keys.pack_rows(k.codes + head * a.keys * a.depth, a.keys, a.depth, a.depth);
    for (int64_t first = 0; first < a.queries; first += AT_ONCE) {
      const int64_t count = std::min(AT_ONCE, a.queries - first);
      weigh_keys(a, q, k, nullptr, head, first, count, h);
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(y + (head * a.queries + first + r) * a.keys, h.scores + r * h.stride, a.keys * sizeof(float));
    }
  }
  return a.heads * a.queries * a.keys * a.depth;
}

// Float32 [heads][queries][width] of probabilities that share one scale.
int64_t weighted_values(const Attention& a, const Quantized& p, const Quantized& v, float* y) {
  float scales[AT_ONCE];
  int32_t zeros[AT_ONCE];
  std::fill(scales, scales + AT_ONCE, p.scales[0]);
  std::fill(zeros, zeros + AT_ONCE, p.zero_points[0]);
  const int threads = threads_for(a.heads * a.queries * a.keys * a.width, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    Heads h(a);
    if (!h.complete()) continue;
    h.values.pack_columns(v.codes + head * a.keys * a.width, a.width, a.keys, a.width);
    for (int64_t first = 0; first < a.queries; first += AT_ONCE) {
      const int64_t row = head * a.queries + first, count = std::min(AT_ONCE, a.queries - first);
      add_values(a, p.codes + row * a.keys, scales, zeros, v, head, count, h, y + row * a.width);
    }
  }
  return a.heads * a.queries * a.keys * a.width;
}

// Both at once where each row of probabilities has a scale of its own. Where `by_value`, each value has one too, which is
// multiplied into the probabilities. Returns -1 where a probability is not finite.
int64_t dynamic_attention(const Attention& a, const Quantized& q, const Quantized& k, const Quantized& v, bool by_value,
                          bool affine, float* y) {
  Quantized values = v;
  if (by_value) values.scales = nullptr;
  int32_t odd = 0;
  const int threads = threads_for(a.heads * a.queries * a.keys * (a.depth + a.width), WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : odd) if (threads > 1)
  for (int64_t head = 0; head < a.heads; ++head) {
    static thread_local Scratch coded;
    Heads h(a);
    uint8_t* codes = coded.of<uint8_t>(AT_ONCE * a.keys);
    if (!h.complete() || !codes) continue;
    h.keys.pack_rows(k.codes + head * a.keys * a.depth, a.keys, a.depth, a.depth);
    h.values.pack_columns(v.codes + head * a.keys * a.width, a.width, a.keys, a.width);
    for (int64_t first = 0; first < a.queries; first += AT_ONCE) {
      const int64_t count = std::min(AT_ONCE, a.queries - first);
      float scales[AT_ONCE];
      int32_t zeros[AT_ONCE];
      weigh_keys(a, q, k, by_value ? v.scales : nullptr, head, first, count, h);
      bool finite = true;
      for (int64_t r = 0; r < count; ++r)
        finite &= quantize_row(h.scores + r * h.stride, a.keys, affine, codes + r * a.keys, scales[r], zeros[r]);
      odd |= !finite;
      if (finite) add_values(a, codes, scales, zeros, values, head, count, h, y + (head * a.queries + first) * a.width);
    }
  }
  return odd ? -1 : a.heads * a.queries * a.keys * (a.depth + a.width);
}

}  // namespace
