// From exact sums to results, a row at a time: zero points, bias, scales, residual, codes or float32.

namespace {

struct Finisher {
  const Weight& weight;
  const Finish& finish;
  const Rows& rows;
  const Operands& operands;
  const int64_t* places;  // of the rows in the result
  int64_t offset, of_block, place, outputs;
  int wide;
  bool raw;        // sums of the codes themselves, not of q_x - z_x
  int64_t taps;    // products of an output in the block at hand
  int64_t block_ = 0;
  int32_t zero_ = 0;
  bool ready = false;
  alignas(64) uint32_t shift[4 * TILE];  // bias, and what the zero point of x adds

  // Outputs of `count` tiles from `tile` on in `group`; `tiles` are those of a group.
  Finisher(const Weight& w, const Finish& f, const Rows& r, const Operands& o, int64_t tiles, int64_t group,
           int64_t tile, int count, bool of_codes, const int64_t* where)
      : weight(w), finish(f), rows(r), operands(o), places(where), wide(count), raw(of_codes) {
    offset = (group * tiles + tile) * TILE;
    of_block = w.groups * tiles * TILE;
    outputs = std::min<int64_t>(count * TILE, w.outputs - tile * TILE);
    place = group * w.outputs + tile * TILE;
    block(0, w.depth);
  }

  void block(int64_t index, int64_t depth) {
    block_ = index;
    taps = depth;
    ready = false;
  }

  int64_t at(int64_t r) const { return places[r] + place; }  // of the first output of row r of the panel

  const int32_t* zero_points() const {
    return weight.zero_points ? weight.zero_points + block_ * of_block + offset : nullptr;
  }

  // Sets `shift` for a row with zero point `zero`.
  void prepare(int32_t zero) {
    if (ready && zero == zero_) return;
    const int32_t *bias = finish.bias ? finish.bias + offset : nullptr, *zeros = zero_points();
    const int32_t* totals = weight.totals + block_ * of_block + offset;
    for (int j = 0; j < wide * TILE; ++j) {
      uint32_t value = bias ? uint32_t(bias[j]) : 0;
      if (raw) value -= uint32_t(zero) * uint32_t(totals[j] - (zeros ? int32_t(taps) * zeros[j] : 0));
      shift[j] = value;
    }
    zero_ = zero;
    ready = true;
  }

  int32_t zero_of(int64_t row) const { return raw ? rows.zero_points[rows.of(row)] : 0; }

  // t [rows][wide * TILE] before the first block.
  void begin(int64_t count, float* t) const {
    for (int64_t r = 0; r < count; ++r, t += wide * TILE)
      for (int n = 0; n < wide; ++n) {
        Floats v = finish.start ? lanes_at(finish.start + offset + n * TILE) : Floats{};
        if (operands.add) v += taken<Floats>(operands.add + at(r) + n * TILE, outputs - n * TILE);
        set_lanes(t + n * TILE, v);
      }
  }

  bool fresh() const { return block_ == 0 && !finish.start && !operands.add; }

  // t += f32(sum) * multiplier, the first block without a start: t = f32(sum) * multiplier. Tile by tile, with what is the
  // same for rows in registers.
  void add(int64_t row, int64_t count, const int32_t* sums, const int32_t* row_sums, float* t) {
    const bool apart = rows.pixels == 1;
    for (int64_t r = 0; r < count;) {
      const int64_t some = apart ? count : std::min(count - r, rows.left(row + r)), from = r * wide * TILE;
      const int32_t* own = row_sums ? row_sums + r : nullptr;
      if (!apart) prepare(zero_of(row + r));
      for (int n = 0; n < wide; ++n)
        apart ? add_tile<true>(n, row, some, sums, own, t) : add_tile<false>(n, row + r, some, sums + from, own, t + from);
      r += some;
    }
  }

  // APART: each row has a zero point and a scale of its own; else all have one.
  template <bool APART>
  void add_tile(int n, int64_t row, int64_t count, const int32_t* sums, const int32_t* row_sums, float* t) const {
    const int64_t at = block_ * of_block + offset + n * TILE;
    const int32_t* zero_points = APART && raw ? rows.zero_points + row : nullptr;
    const float* scales = rows.scales ? rows.scales + (APART ? row : rows.of(row)) : nullptr;
    const Wrapping zeros = weight.zero_points ? wrapping_at(weight.zero_points + at) : Wrapping{};
    const Wrapping total = APART ? wrapping_at(weight.totals + at) - zeros * uint32_t(taps) : Wrapping{};
    const Wrapping bias = finish.bias ? wrapping_at(finish.bias + offset + n * TILE) : Wrapping{};
    const Wrapping start = APART ? bias : wrapping_at(shift + n * TILE);
    const Floats multiplier = lanes_at(finish.multiplier + at), scaled = scales ? scales[0] * multiplier : multiplier;
    const bool first = fresh();
    for (int64_t r = 0, from = n * TILE; r < count; ++r, from += wide * TILE) {
      Wrapping sum = wrapping_at(sums + from) + start;
      if (zero_points) sum -= total * uint32_t(zero_points[r]);
      if (weight.zero_points) sum -= zeros * uint32_t(row_sums[r]);
      const Floats term = to_floats(as_ints(sum)) * (APART && scales ? scales[r] * multiplier : scaled);
      set_lanes(t + from, first ? term : lanes_at(t + from) + term);
    }
  }

  void end(int64_t count, float* t) const {
    if (operands.residual)
      for (int64_t r = 0; r < count; ++r) {
        const uint8_t* residual = operands.residual + at(r);
        for (int64_t j = 0; j < outputs; ++j)
          t[r * wide * TILE + j] += float(residual[j] - finish.residual_zero_point) * finish.residual_multiplier;
      }
    if (finish.to_float) return floats(count, t);
    for (int64_t r = 0; r < count; ++r) codes(t + r * wide * TILE, static_cast<uint8_t*>(operands.y) + at(r));
  }

  void codes(const float* t, uint8_t* y) const {
    const float low = float(finish.q_min - finish.zero_point), high = float(finish.q_max - finish.zero_point);
    for (int n = 0; n < wide; ++n) {
      const Ints q = rounded_lanes(lanes_at(t + n * TILE), low, high) + finish.zero_point;
      if (n * TILE < outputs) put(to_bytes(q), outputs - n * TILE, y + n * TILE);
    }
    if (finish.table) replace(y, outputs, finish.table, y);
  }

  void floats(int64_t count, const float* t) const {
    const bool clamps = finish.low > -INFINITY || finish.high < INFINITY;
    for (int64_t r = 0; r < count; ++r, t += wide * TILE)
      for (int64_t j = 0; j < outputs; j += TILE) {
        Floats v = lanes_at(t + j);
        if (finish.last) v += lanes_at(finish.last + offset + j);
        if (clamps) v = at_most(at_least(v, finish.low), finish.high);  // NaN stays NaN, as torch's clamp has it
        put(v, outputs - j, static_cast<float*>(operands.y) + at(r) + j);
      }
  }

  // All of it where a layer has one block and nothing to start from: sums [count][wide * TILE] to results.
  void whole(int64_t row, int64_t count, const int32_t* sums, const int32_t* row_sums, float* t) {
#if defined(QB_AVX2)
    if (!finish.to_float && !rows.scales && fresh()) return static_codes(row, count, sums, row_sums);
    if (finish.to_float && block_ == 0 && !finish.start && !operands.residual)
      return floats_of_rows(row, count, sums, row_sums);
#endif
    if (!fresh()) begin(count, t);
    add(row, count, sums, row_sums, t);
    end(count, t);
  }

#if defined(QB_AVX2)
  enum Kind { PLAIN, WITH_RESIDUAL, ANY };

  // As `whole` for codes with one scale and zero point of x: all tiles a turn.
  void static_codes(int64_t row, int64_t count, const int32_t* sums, const int32_t* row_sums) {
    prepare(zero_of(row));
    const bool plain = !zero_points() && outputs == wide * TILE && below_int32();
    const Kind kind = !plain ? ANY : operands.residual ? WITH_RESIDUAL : PLAIN;
#if defined(QB_AVX512)
    if (wide == 4) tiles_of_codes<4>(kind, count, sums, row_sums);
    if (wide == 3) tiles_of_codes<3>(kind, count, sums, row_sums);
    if (wide == 2) tiles_of_codes<2>(kind, count, sums, row_sums);
#endif
    if (wide == 1) tiles_of_codes<1>(kind, count, sums, row_sums);
    if (finish.table)
      replace_rows(count, outputs, finish.table, [this](int64_t r) {
        uint8_t* y = static_cast<uint8_t*>(operands.y) + at(r);
        return FromTo{y, y};
      });
  }

  // Do all products of sums and multipliers lie within int32? Then what is above the codes needs no clamp as a float.
  bool below_int32() const {
    int32_t beyond = !(finish.residual_multiplier < 0x1p20f);
    for (int j = 0; j < wide * TILE; ++j) beyond |= !(std::fabs(finish.multiplier[offset + j]) < 0.5f);
    return !beyond;
  }

  template <int C>
  void tiles_of_codes(Kind kind, int64_t count, const int32_t* sums, const int32_t* row_sums) const {
    if (kind == PLAIN) return rows_of_codes<C, PLAIN>(count, sums, row_sums);
    if (kind == WITH_RESIDUAL) return rows_of_codes<C, WITH_RESIDUAL>(count, sums, row_sums);
    return rows_of_codes<C, ANY>(count, sums, row_sums);
  }

#if defined(QB_AVX512)
  template <int C, Kind KIND>
  void rows_of_codes(int64_t count, const int32_t* sums, const int32_t* row_sums) const {
    const int32_t* zeros = KIND == ANY ? zero_points() : nullptr;
    const bool adds = KIND == WITH_RESIDUAL || (KIND == ANY && operands.residual);
    const __m512 high = _mm512_set1_ps(float(finish.q_max - finish.zero_point));
    const __m512i zero_point = _mm512_set1_epi16(int16_t(finish.zero_point));
    const __m512i lowest = _mm512_set1_epi8(char(finish.q_min)), highest = _mm512_set1_epi8(char(finish.q_max));
    const uint64_t there = outputs >= 64 ? ~0ull : (1ull << outputs) - 1;
    const __m512i residual_zero = _mm512_set1_epi32(finish.residual_zero_point);
    const __m512 residual_multiplier = _mm512_set1_ps(finish.residual_multiplier);
    __m512 m[C];
    __m512i bias[C];
#pragma GCC unroll 4
    for (int n = 0; n < C; ++n) {
      m[n] = _mm512_loadu_ps(finish.multiplier + offset + n * TILE);
      bias[n] = _mm512_load_si512(shift + n * TILE);
    }
    for (int64_t r = 0; r < count; ++r, sums += C * TILE) {
      uint8_t* y = static_cast<uint8_t*>(operands.y) + at(r);
      __m512i q[4];
#pragma GCC unroll 4
      for (int n = 0; n < C; ++n) {
        __m512i acc = _mm512_add_epi32(_mm512_load_si512(sums + n * TILE), bias[n]);
        if (KIND == ANY && zeros)
          acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(_mm512_loadu_si512(zeros + n * TILE), _mm512_set1_epi32(row_sums[r])));
        __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), m[n]);
        if (adds) {
          const uint8_t* residual = operands.residual + at(r) + n * TILE;
          const __m128i some = KIND == ANY ? _mm_maskz_loadu_epi8(__mmask16(there >> (16 * n)), residual)
                                           : _mm_loadu_si128(reinterpret_cast<const __m128i*>(residual));
          const __m512i centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(some), residual_zero);
          v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_cvtepi32_ps(centred), residual_multiplier));
        }
        // What lies below int32 becomes its lowest value, as NaN does: it ends at q_min.
        q[n] = _mm512_cvtps_epi32(KIND == ANY ? _mm512_min_ps(high, v) : v);
      }
      for (int n = C; n < 4; ++n) q[n] = q[C - 1];
      const __m512i first = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero_point);
      const __m512i second = _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), zero_point);
      __m512i codes = _mm512_max_epu8(_mm512_packus_epi16(first, second), lowest);
      if (KIND != ANY) codes = _mm512_min_epu8(codes, highest);
      codes = in_order(codes);
      if (KIND == ANY || C == 3)
        _mm512_mask_storeu_epi8(y, there, codes);
      else if (C == 4)
        _mm512_storeu_si512(y, codes);
      else if (C == 2)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_castsi512_si256(codes));
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_castsi512_si128(codes));
    }
  }
#else
  // Two rows a turn.
  template <int C, Kind KIND>
  void rows_of_codes(int64_t count, const int32_t* sums, const int32_t* row_sums) const {
    static_assert(C == 1, "a tile fills the registers of this path");
    const int32_t* zeros = KIND == ANY ? zero_points() : nullptr;
    const bool adds = KIND == WITH_RESIDUAL || (KIND == ANY && operands.residual);
    const int64_t some = KIND == ANY ? outputs : TILE;
    const __m256 high = _mm256_set1_ps(float(finish.q_max - finish.zero_point));
    const __m256i zero_point = _mm256_set1_epi16(int16_t(finish.zero_point));
    const __m256i lowest = _mm256_set1_epi8(char(finish.q_min)), highest = _mm256_set1_epi8(char(finish.q_max));
    const __m256i residual_zero = _mm256_set1_epi32(finish.residual_zero_point);
    const __m256 residual_multiplier = _mm256_set1_ps(finish.residual_multiplier);
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const auto eight = [](const auto* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); };
    const __m256 m[2] = {_mm256_loadu_ps(finish.multiplier + offset), _mm256_loadu_ps(finish.multiplier + offset + 8)};
    const __m256i bias[2] = {eight(shift), eight(shift + 8)};
    const auto words = [&](int64_t r) {  // a row's codes, in the order in which they are packed
      const __m128i residual = adds ? __m128i(taken<Bytes>(operands.residual + at(r), some)) : _mm_setzero_si128();
      __m256i q[2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        __m256i acc = _mm256_add_epi32(eight(sums + r * TILE + n * 8), bias[n]);
        if (KIND == ANY && zeros)
          acc = _mm256_sub_epi32(acc, _mm256_mullo_epi32(eight(zeros + n * 8), _mm256_set1_epi32(row_sums[r])));
        __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(acc), m[n]);
        if (adds) {
          const __m256i codes = _mm256_cvtepu8_epi32(n ? _mm_srli_si128(residual, 8) : residual);
          const __m256i centred = _mm256_sub_epi32(codes, residual_zero);
          v = _mm256_add_ps(v, _mm256_mul_ps(_mm256_cvtepi32_ps(centred), residual_multiplier));
        }
        q[n] = _mm256_cvtps_epi32(KIND == ANY ? _mm256_min_ps(high, v) : v);  // below int32 as above
      }
      return _mm256_adds_epi16(_mm256_packs_epi32(q[0], q[1]), zero_point);
    };
    uint8_t* const y = static_cast<uint8_t*>(operands.y);
    for (int64_t r = 0; r < count; r += 2) {
      const int64_t second = std::min(r + 1, count - 1);
      const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words(r), words(second)), in_order);
      const __m256i codes = _mm256_min_epu8(_mm256_max_epu8(packed, lowest), highest);
      put(Bytes(_mm256_castsi256_si128(codes)), some, y + at(r));
      put(Bytes(_mm256_extracti128_si256(codes, 1)), some, y + at(second));
    }
  }
#endif

#if defined(QB_AVX512)
  // As `whole` for float32: up to 64 outputs a turn.
  void floats_of_rows(int64_t row, int64_t count, const int32_t* sums, const int32_t* row_sums) const {
    if (wide == 4) return operands.add ? rows_of_floats<4, true>(row, count, sums, row_sums)
                                       : rows_of_floats<4, false>(row, count, sums, row_sums);
    if (wide == 3) return rows_of_floats<3, true>(row, count, sums, row_sums);
    if (wide == 2) return rows_of_floats<2, true>(row, count, sums, row_sums);
    return rows_of_floats<1, true>(row, count, sums, row_sums);
  }

  template <int C, bool MAY_ADD>
  void rows_of_floats(int64_t row, int64_t count, const int32_t* sums, const int32_t* row_sums) const {
    const int32_t *zeros = zero_points(), *totals = weight.totals + block_ * of_block + offset;
    const bool clamps = finish.low > -INFINITY || finish.high < INFINITY;
    const bool adds = MAY_ADD && operands.add;
    const uint64_t there = outputs >= 64 ? ~0ull : (1ull << outputs) - 1;
    __m512 m[C], last[C];
    __m512i total[C], bias[C];
#pragma GCC unroll 4
    for (int n = 0; n < C; ++n) {
      const int64_t from = offset + n * TILE;
      m[n] = _mm512_loadu_ps(finish.multiplier + from);
      last[n] = finish.last ? _mm512_loadu_ps(finish.last + from) : _mm512_setzero_ps();
      bias[n] = finish.bias ? _mm512_loadu_si512(finish.bias + from) : _mm512_setzero_si512();
      total[n] = raw ? _mm512_loadu_si512(totals + n * TILE) : _mm512_setzero_si512();
      if (raw && zeros)
        total[n] = _mm512_sub_epi32(total[n], _mm512_mullo_epi32(_mm512_loadu_si512(zeros + n * TILE), _mm512_set1_epi32(int32_t(taps))));
    }
    __m512i start[C];  // what a row of this zero point begins with
    int32_t zero_point = 0;
    for (int64_t r = 0; r < count; ++r, sums += C * TILE) {
      const int64_t own = rows.of(row + r), to = at(r);
      if (r == 0 || zero_point != rows.zero_points[own]) {
        zero_point = rows.zero_points[own];
#pragma GCC unroll 4
        for (int n = 0; n < C; ++n)
          start[n] = _mm512_sub_epi32(bias[n], _mm512_mullo_epi32(total[n], _mm512_set1_epi32(zero_point)));
      }
      const __m512 row_scale = _mm512_set1_ps(rows.scales ? rows.scales[own] : 1.0f);
#pragma GCC unroll 4
      for (int n = 0; n < C; ++n) {
        const __mmask16 some = __mmask16(there >> (16 * n));
        __m512i acc = _mm512_add_epi32(_mm512_load_si512(sums + n * TILE), start[n]);
        if (zeros)
          acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(_mm512_loadu_si512(zeros + n * TILE), _mm512_set1_epi32(row_sums[r])));
        __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_mul_ps(row_scale, m[n]));
        if (adds)  // -0 becomes 0, as in `begin`
          v = _mm512_add_ps(_mm512_add_ps(_mm512_setzero_ps(), _mm512_maskz_loadu_ps(some, operands.add + to + n * TILE)), v);
        if (finish.last) v = _mm512_add_ps(v, last[n]);
        if (clamps) v = __m512(at_most(at_least(Floats(v), finish.low), finish.high));
        _mm512_mask_storeu_ps(static_cast<float*>(operands.y) + to + n * TILE, some, v);
      }
    }
  }

#else
  // As `whole` for float32: a tile a turn.
  void floats_of_rows(int64_t row, int64_t count, const int32_t* sums, const int32_t* row_sums) const {
    const int32_t* zeros = zero_points();
    const bool clamps = finish.low > -INFINITY || finish.high < INFINITY;
    const Floats m = lanes_at(finish.multiplier + offset), last = finish.last ? lanes_at(finish.last + offset) : Floats{};
    const Wrapping bias = finish.bias ? wrapping_at(finish.bias + offset) : Wrapping{};
    const Wrapping zero_points = zeros ? wrapping_at(zeros) : Wrapping{};
    const Wrapping total = raw ? wrapping_at(weight.totals + offset) - zero_points * uint32_t(taps) : Wrapping{};
    for (int64_t r = 0; r < count; ++r, sums += TILE) {
      const int64_t own = rows.of(row + r), to = at(r);
      Wrapping acc = wrapping_at(sums) + bias;
      if (raw) acc -= total * uint32_t(rows.zero_points[own]);
      if (zeros) acc -= zero_points * uint32_t(row_sums[r]);
      Floats v = to_floats(as_ints(acc)) * (rows.scales ? m * rows.scales[own] : m);
      if (operands.add) v = (Floats{} + taken<Floats>(operands.add + to, outputs)) + v;  // -0 becomes 0, as in `begin`
      if (finish.last) v += last;
      if (clamps) v = at_most(at_least(v, finish.low), finish.high);
      put(v, outputs, static_cast<float*>(operands.y) + to);
    }
  }
#endif
#endif
};

}  // namespace
