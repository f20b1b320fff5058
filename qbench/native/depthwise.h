// Convolutions with one input channel for each output channel: no matrix product, channel by channel side by side.

namespace {

constexpr int CHANNELS = 16;  // channels whose sums stay in registers while the taps go by

#if !defined(QB_AVX2)
// sums[c] += (x[c] - zero) * w[c]
inline void tap(const uint8_t* x, int32_t zero, const int16_t* w, int32_t* sums) {
  for (int c = 0; c < CHANNELS; ++c) sums[c] += (int32_t(x[c]) - zero) * w[c];
}

int64_t packed_depthwise_size(int64_t channels, int64_t height, int64_t width) {
  return height * width * rounded_up(channels, CHANNELS) * int64_t(sizeof(int16_t));
}

// [taps][channels] of q_w - z_w.
void pack_depthwise(const int8_t* weight, const int32_t* zero_points, int64_t channels, int64_t height, int64_t width,
                    int8_t* packed, int32_t* totals) {
  int16_t* values = reinterpret_cast<int16_t*>(packed);
  const int64_t taps = height * width, all = rounded_up(channels, CHANNELS);
  std::fill(values, values + taps * all, int16_t(0));
  std::fill(totals, totals + all, 0);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < taps; ++k)
      values[k * all + c] = int16_t(weight[c * taps + k] - (zero_points ? zero_points[c] : 0));
}

int64_t depthwise(const Weight& centred, const Finish& finish, const Window& v, const Rows& rows, const Operands& o) {
  const int16_t* weight = reinterpret_cast<const int16_t*>(centred.values);
  Weight shape = centred;  // its zero points are in the values
  shape.zero_points = nullptr;
  const int64_t channels = v.channels, pixels = v.out_height * v.out_width, taps = v.kernel_height * v.kernel_width;
  const int64_t lines = o.samples * v.out_height, tiles = (channels + TILE - 1) / TILE;
  const int threads = threads_for(o.samples * pixels * channels * taps, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t sample = line / v.out_height, top = line % v.out_height * v.stride_height - v.padding_height;
    const uint8_t* image = static_cast<const uint8_t*>(o.x) + sample * v.height * v.width * channels;
    const int32_t zero = rows.zero_points[rows.of(line * v.out_width)];
    for (int64_t first = 0; first < channels; first += CHANNELS) {
      const int64_t count = std::min<int64_t>(CHANNELS, channels - first);
      int64_t place = line * v.out_width * channels;
      Finisher finisher(shape, finish, rows, o, tiles, 0, first / TILE, 1, false, &place);
      for (int64_t column = 0; column < v.out_width; ++column, place += channels) {
        const int64_t left = column * v.stride_width - v.padding_width;
        alignas(64) int32_t sums[CHANNELS] = {};
        for (int64_t i = 0; i < v.kernel_height; ++i) {
          const int64_t y = top + i * v.dilation_height;
          if (y < 0 || y >= v.height) continue;
          for (int64_t j = 0; j < v.kernel_width; ++j) {
            const int64_t x = left + j * v.dilation_width;
            if (x < 0 || x >= v.width) continue;
            const uint8_t* at = image + (y * v.width + x) * channels + first;
            const int16_t* w = weight + (i * v.kernel_width + j) * rounded_up(channels, CHANNELS) + first;
            if (count == CHANNELS) {
              tap(at, zero, w, sums);
            } else {
              uint8_t some[CHANNELS] = {};
              std::memcpy(some, at, count);
              tap(some, zero, w, sums);
            }
          }
        }
        alignas(64) float t[TILE];
        finisher.whole(line * v.out_width + column, 1, sums, nullptr, t);
      }
    }
  }
  return o.samples * pixels * channels * taps;
}

#else

// Four rows of the image are joined to [columns][channels][4 rows], so that one instruction adds up the taps of a column
// of the kernel. A kernel of up to three rows (of stride 1) meets them twice: for two rows of the result.

constexpr int64_t JOINED = 4;

#if defined(QB_VNNI)
using Tap = int8_t;
#else
using Tap = int16_t;  // of q_w - z_w
#endif

// The codes that 16 channels have in four rows of a column, and the sums of their products: [channels][4] times [channels][4].
#if defined(QB_AVX512)
struct Column {
  __m512i codes;
  explicit Column(const uint8_t* at) : codes(_mm512_loadu_si512(at)) {}
};

struct Taps {
  __m512i sums;
  explicit Taps(Ints start) : sums(__m512i(start)) {}
  void add(const Column& q, const Tap* w) { add_products(sums, q.codes, _mm512_loadu_si512(w)); }
  void add_all(const Column& q, int32_t four) { add_products(sums, q.codes, _mm512_set1_epi32(four)); }
  Ints total() const { return Ints(sums); }
};
#elif defined(QB_VNNI)
struct Column {
  __m256i codes[2];
  explicit Column(const uint8_t* at) : codes{load(at), load(at + 32)} {}
};

struct Taps {
  __m256i sums[2];
  explicit Taps(Ints start) : sums{__m256i(start.low), __m256i(start.high)} {}
  void add(const Column& q, const Tap* w) {
    add_products(sums[0], q.codes[0], load(w));
    add_products(sums[1], q.codes[1], load(w + 32));
  }
  void add_all(const Column& q, int32_t four) {
    add_products(sums[0], q.codes[0], everywhere(four));
    add_products(sums[1], q.codes[1], everywhere(four));
  }
  Ints total() const { return {HalfInts(sums[0]), HalfInts(sums[1])}; }
};
#else
struct Column {
  __m256i codes[4];  // of four channels each
  explicit Column(const uint8_t* at) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      codes[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + i * 16)));
  }
};

struct Taps {
  Ints start;
  __m256i sums[4];  // of four channels each, two a channel
  explicit Taps(Ints from) : start(from) {
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  }
  void add(const Column& q, const Tap* w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i * 16));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(q.codes[i], weights));
      asm("" : "+x"(sums[i]));  // else g++ makes all products before it adds any, on the stack
    }
  }
  void add_all(const Column&, int32_t) {}
  Ints total() const {
    const auto joined = [](__m256i a, __m256i b) { return HalfInts(_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xD8)); };
    const Ints all{joined(sums[0], sums[1]), joined(sums[2], sums[3])};
    return as_ints(as_wrapping(start) + as_wrapping(all));
  }
};
#endif

inline int64_t joins(int64_t height) { return (height + JOINED - 1) / JOINED; }

int64_t packed_depthwise_size(int64_t channels, int64_t height, int64_t width) {
  return 2 * joins(height) * width * JOINED * rounded_up(channels, CHANNELS) * int64_t(sizeof(Tap));
}

// [shift of a row: 0, 1][joined rows][kernel columns][channels][4]; a shift of 1 that does not fit is not used.
void pack_depthwise(const int8_t* weight, const int32_t* zero_points, int64_t channels, int64_t height, int64_t width,
                    int8_t* packed, int32_t* totals) {
  const int64_t all = rounded_up(channels, CHANNELS), n = joins(height);
  const bool centred = sizeof(Tap) > 1 && zero_points;
  Tap* values = reinterpret_cast<Tap*>(packed);
  std::memset(packed, 0, packed_depthwise_size(channels, height, width));
  std::fill(totals, totals + all, 0);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const Tap value = Tap(weight[(c * height + i) * width + j] - (centred ? zero_points[c] : 0));
        totals[c] += value;
        for (int64_t shift = 0; shift < 2 && i + shift < JOINED * n; ++shift) {
          const int64_t row = i + shift;
          values[((((shift * n + row / JOINED) * width) + j) * all + c) * JOINED + row % JOINED] = value;
        }
      }
}

// [count] bytes of each of four rows as [count][4].
inline void join(const uint8_t* const* rows, int64_t count, uint8_t* out) {
#if defined(QB_AVX512)
  for (int64_t i = 0; i < count; i += 64) {
    const uint64_t there = count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1;
    __m512i x[4];
    for (int r = 0; r < 4; ++r) x[r] = _mm512_maskz_loadu_epi8(there, rows[r] + i);
    const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
    const __m512i e = _mm512_unpacklo_epi16(a, c), f = _mm512_unpackhi_epi16(a, c);  // lane l: values 16 l + 0-3, 4-7
    const __m512i g = _mm512_unpacklo_epi16(b, d), h = _mm512_unpackhi_epi16(b, d);  // 8-11, 12-15
    const __m512i ef = _mm512_shuffle_i32x4(e, f, 0x44), gh = _mm512_shuffle_i32x4(g, h, 0x44);  // lanes 0, 1
    const __m512i EF = _mm512_shuffle_i32x4(e, f, 0xEE), GH = _mm512_shuffle_i32x4(g, h, 0xEE);  // lanes 2, 3
    uint8_t* to = out + i * 4;
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(ef, gh, 0x88));
    _mm512_storeu_si512(to + 64, _mm512_shuffle_i32x4(ef, gh, 0xDD));
    _mm512_storeu_si512(to + 128, _mm512_shuffle_i32x4(EF, GH, 0x88));
    _mm512_storeu_si512(to + 192, _mm512_shuffle_i32x4(EF, GH, 0xDD));
  }
#else
  const auto at = [](const uint8_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); };
  const auto joined = [at](const uint8_t* p, const uint8_t* q, const uint8_t* r, const uint8_t* s, uint8_t* y) {
    const __m256i a = _mm256_unpacklo_epi8(at(p), at(q)), b = _mm256_unpackhi_epi8(at(p), at(q));
    const __m256i c = _mm256_unpacklo_epi8(at(r), at(s)), d = _mm256_unpackhi_epi8(at(r), at(s));
    const __m256i e = _mm256_unpacklo_epi16(a, c), f = _mm256_unpackhi_epi16(a, c);  // lane l: values 16 l + 0-3, 4-7
    const __m256i g = _mm256_unpacklo_epi16(b, d), h = _mm256_unpackhi_epi16(b, d);  // 8-11, 12-15
    __m256i* to = reinterpret_cast<__m256i*>(y);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(e, f, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(g, h, 0x20));
    _mm256_storeu_si256(to + 2, _mm256_permute2x128_si256(e, f, 0x31));
    _mm256_storeu_si256(to + 3, _mm256_permute2x128_si256(g, h, 0x31));
  };
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) joined(rows[0] + i, rows[1] + i, rows[2] + i, rows[3] + i, out + i * 4);
  if (i < count) {
    uint8_t last[4][32] = {};
    for (int r = 0; r < 4; ++r) std::memcpy(last[r], rows[r] + i, count - i);
    joined(last[0], last[1], last[2], last[3], out + i * 4);
  }
#endif
}

struct Depthwise {
  const Weight& weight;
  Weight plain;  // for finishers: zero points are taken off here
  Finish finish;  // without the table, which takes whole rows of the result
  const uint8_t* table;
  const Window& v;
  const Rows& rows;
  const Operands& o;
  int64_t channels, all, n, columns, taps;
  bool codes;

  Depthwise(const Weight& w, const Finish& f, const Window& window, const Rows& r, const Operands& operands)
      : weight(w), plain(w), finish(f), table(f.table), v(window), rows(r), o(operands) {
    plain.zero_points = nullptr;
    finish.table = nullptr;
    channels = v.channels;
    all = rounded_up(channels, CHANNELS);
    n = joins(v.kernel_height);
    columns = (v.out_width - 1) * v.stride_width + (v.kernel_width - 1) * v.dilation_width + 1;
    taps = v.kernel_height * v.kernel_width;
    codes = !f.to_float && !f.start && !o.add && !r.scales && !o.residual;
  }

  // Bytes of the joined rows: the last load may go beyond a column.
  int64_t joined_size() const { return n * (columns * channels + 64) * JOINED; }
  int64_t joined_stride() const { return (columns * channels + 64) * JOINED; }

  // The rows from `top` on that the kernel meets (dilated), joined; what lies beside the image is `zero`.
  void join_rows(int64_t sample, int64_t top, uint8_t zero, const uint8_t* zeros, uint8_t* out) const {
    const uint8_t* image = static_cast<const uint8_t*>(o.x) + sample * v.height * v.width * channels;
    const int64_t from = std::clamp<int64_t>(v.padding_width, 0, columns);
    const int64_t to = std::clamp<int64_t>(v.width + v.padding_width, from, columns);
    for (int64_t g = 0; g < n; ++g, out += joined_stride()) {
      const uint8_t* at[JOINED];
      for (int64_t r = 0; r < JOINED; ++r) {
        const int64_t y = top + (g * JOINED + r) * v.dilation_height;
        at[r] = y >= 0 && y < v.height ? image + (y * v.width + from - v.padding_width) * channels : zeros;
      }
      std::memset(out, zero, from * channels * JOINED);
      join(at, (to - from) * channels, out + from * channels * JOINED);
      std::memset(out + to * channels * JOINED, zero, (columns - to) * channels * JOINED);
    }
  }

  // What the sums of the channels from `c` on, whose weights have these zero points, begin with.
  Ints start_of(int64_t c, int32_t zero, Wrapping zeros) const {
    Wrapping from = wrapping_at(weight.totals + c) * uint32_t(-zero) + zeros * (uint32_t(taps) * uint32_t(zero));
    if (codes && finish.bias) from += wrapping_at(finish.bias + c);
    return as_ints(from);
  }

  // `OUT` rows of the result from `line` on, out of joined rows.
  template <int OUT, bool AFFINE>
  void lines(int64_t line, int32_t zero, const uint8_t* joined) const {
    const int64_t step = v.stride_width * channels * JOINED, tap = v.dilation_width * channels * JOINED;
    const Tap* packed = reinterpret_cast<const Tap*>(weight.values);
    const int64_t shift_stride = n * v.kernel_width * all * JOINED;
    const float low = float(finish.q_min - finish.zero_point), high = float(finish.q_max - finish.zero_point);
    for (int64_t c = 0; c < channels; c += CHANNELS) {
      const Wrapping zeros = AFFINE ? wrapping_at(weight.zero_points + c) : Wrapping{};
      const Ints start = start_of(c, zero, zeros);
      const Floats m = lanes_at(finish.multiplier + c);
      int64_t place = 0;
      Finisher finisher(plain, finish, rows, o, all / TILE, 0, c / TILE, 1, false, &place);
      for (int64_t x = 0; x < v.out_width; ++x) {
        const uint8_t* at = joined + x * step + c * JOINED;
        Taps sums[2] = {Taps(start), Taps(start)}, met[2] = {Taps(Ints{}), Taps(Ints{})};
        for (int64_t g = 0; g < n; ++g)
          for (int64_t j = 0; j < v.kernel_width; ++j) {
            const Column q(at + g * joined_stride() + j * tap);
            const Tap* w = packed + ((g * v.kernel_width + j) * all + c) * JOINED;
#pragma GCC unroll 2
            for (int r = 0; r < OUT; ++r) {
              sums[r].add(q, w + r * shift_stride);
              if (AFFINE) met[r].add_all(q, rows_met(g, r));
            }
          }
#pragma GCC unroll 2
        for (int r = 0; r < OUT; ++r) {
          Ints acc = sums[r].total();
          if (AFFINE) acc = as_ints(as_wrapping(acc) - zeros * as_wrapping(met[r].total()));
          place = ((line + r) * v.out_width + x) * channels;
          if (codes) {
            const Ints q = rounded_lanes(to_floats(acc) * m, low, high) + finish.zero_point;
            put(to_bytes(q), channels - c, static_cast<uint8_t*>(o.y) + place + c);
          } else {
            alignas(64) float t[TILE];
            finisher.whole((line + r) * v.out_width + x, 1, reinterpret_cast<const int32_t*>(&acc), nullptr, t);
          }
        }
      }
    }
  }

#if defined(QB_AVX512)
  // As `lines`, for the kernel that there is most of: three columns, up to four rows, codes to codes.
  template <int OUT, bool AFFINE>
  void lines_by_three(int64_t line, int32_t zero, const uint8_t* joined) const {
    const int64_t width = v.out_width, step = v.stride_width * channels * JOINED, tap = v.dilation_width * channels * JOINED;
    const int64_t w_tap = all * JOINED, w_shift = 3 * w_tap, pixel = channels, row = width * channels;
    const __m512 high = _mm512_set1_ps(float(finish.q_max - finish.zero_point));
    const __m512i low = _mm512_set1_epi32(finish.q_min - finish.zero_point), zero_point = _mm512_set1_epi32(finish.zero_point);
    __m512i ones[OUT];
    for (int r = 0; r < OUT; ++r) ones[r] = _mm512_set1_epi32(rows_met(0, r));
    for (int64_t c = 0; c < channels; c += CHANNELS) {
      const int64_t count = std::min<int64_t>(CHANNELS, channels - c);
      const __m512i zeros = AFFINE ? _mm512_loadu_si512(weight.zero_points + c) : _mm512_setzero_si512();
      const __m512i start = __m512i(start_of(c, zero, Wrapping(zeros)));
      const __m512 m = _mm512_loadu_ps(finish.multiplier + c);
      __m512i w[OUT][3];
#pragma GCC unroll 2
      for (int r = 0; r < OUT; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) w[r][j] = _mm512_loadu_si512(weight.values + r * w_shift + j * w_tap + c * JOINED);
      const uint8_t* at = joined + c * JOINED;
      uint8_t* __restrict y = static_cast<uint8_t*>(o.y) + line * row + c;
      for (int64_t x = 0; x < width; ++x, at += step, y += pixel) {
        const __m512i q[3] = {_mm512_loadu_si512(at), _mm512_loadu_si512(at + tap), _mm512_loadu_si512(at + 2 * tap)};
#pragma GCC unroll 2
        for (int r = 0; r < OUT; ++r) {
          __m512i sum = start;
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) add_products(sum, q[j], w[r][j]);
          if (AFFINE) {
            __m512i met = _mm512_setzero_si512();
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) add_products(met, q[j], ones[r]);
            sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros, met));
          }
          const __m512 value = _mm512_min_ps(high, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), m));
          const __m512i codes = _mm512_add_epi32(_mm512_max_epi32(_mm512_cvtps_epi32(value), low), zero_point);
          const __m128i bytes = _mm512_cvtepi32_epi8(codes);
          if (count == CHANNELS)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(y + r * row), bytes);
          else
            std::memcpy(y + r * row, &bytes, count);
        }
      }
    }
  }

#else
  // As above, in shorter registers, which hold neither the weights nor all columns.
  template <int OUT, bool AFFINE>
  void lines_by_three(int64_t line, int32_t zero, const uint8_t* joined) const {
    const int64_t width = v.out_width, step = v.stride_width * channels * JOINED, tap = v.dilation_width * channels * JOINED;
    const int64_t w_tap = all * JOINED, w_shift = 3 * w_tap, row = width * channels;
    const float low = float(finish.q_min - finish.zero_point), high = float(finish.q_max - finish.zero_point);
    for (int64_t c = 0; c < channels; c += CHANNELS) {
      const Wrapping zeros = AFFINE ? wrapping_at(weight.zero_points + c) : Wrapping{};
      const Ints start = start_of(c, zero, zeros);
      const Floats m = lanes_at(finish.multiplier + c);
      const Tap* w = reinterpret_cast<const Tap*>(weight.values) + c * JOINED;
      const uint8_t* at = joined + c * JOINED;
      uint8_t* __restrict y = static_cast<uint8_t*>(o.y) + line * row + c;
      for (int64_t x = 0; x < width; ++x, at += step, y += channels) {
        Taps sums[2] = {Taps(start), Taps(start)}, met[2] = {Taps(Ints{}), Taps(Ints{})};
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const Column q(at + j * tap);
#pragma GCC unroll 2
          for (int r = 0; r < OUT; ++r) {
            sums[r].add(q, w + r * w_shift + j * w_tap);
            if (AFFINE) met[r].add_all(q, rows_met(0, r));
          }
        }
#pragma GCC unroll 2
        for (int r = 0; r < OUT; ++r) {
          Ints sum = sums[r].total();
          if (AFFINE) sum = as_ints(as_wrapping(sum) - zeros * as_wrapping(met[r].total()));
          const Ints q = rounded_lanes(to_floats(sum) * m, low, high) + finish.zero_point;
          put(to_bytes(q), channels - c, y + r * row);
        }
      }
    }
  }
#endif

  // 1 for each joined row that the kernel of row `shift` of the result meets.
  int32_t rows_met(int64_t g, int shift) const {
    uint32_t ones = 0;
    for (int64_t r = 0; r < JOINED; ++r) {
      const int64_t i = g * JOINED + r - shift;
      if (i >= 0 && i < v.kernel_height) ones |= 1u << (8 * r);
    }
    return int32_t(ones);
  }

  template <int OUT, bool AFFINE>
  void lines_of(int64_t line, int32_t zero, const uint8_t* joined) const {
    if (codes && v.kernel_width == 3 && n == 1)
      lines_by_three<OUT, AFFINE>(line, zero, joined);
    else
      lines<OUT, AFFINE>(line, zero, joined);
    uint8_t* y = static_cast<uint8_t*>(o.y) + line * v.out_width * channels;
    if (table) replace(y, OUT * v.out_width * channels, table, y);
  }
};

int64_t depthwise(const Weight& weight, const Finish& finish, const Window& v, const Rows& rows, const Operands& o) {
  const Depthwise d(weight, finish, v, rows, o);
  const bool two = v.stride_height == 1 && v.dilation_height == 1 && d.n * JOINED > v.kernel_height;
  const int64_t pairs = two ? (v.out_height + 1) / 2 : v.out_height;
  const int64_t macs = o.samples * v.out_height * v.out_width * d.channels * d.taps;
  const int threads = threads_for(macs, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t index = 0; index < o.samples * pairs; ++index) {
    static thread_local Scratch joined_scratch, zero_scratch;
    uint8_t* joined = joined_scratch.of<uint8_t>(d.joined_size());
    uint8_t* zeros = zero_scratch.of<uint8_t>(v.width * d.channels);
    if (!joined || !zeros) continue;
    const int64_t sample = index / pairs, y = index % pairs * (two ? 2 : 1), line = sample * v.out_height + y;
    const int32_t zero = rows.zero_points[rows.of(line * v.out_width)];
    std::memset(zeros, zero, v.width * d.channels);
    d.join_rows(sample, y * v.stride_height - v.padding_height, uint8_t(zero), zeros, joined);
    const bool both = two && y + 1 < v.out_height;
    if (sizeof(Tap) == 1 && weight.zero_points)
      both ? d.lines_of<2, true>(line, zero, joined) : d.lines_of<1, true>(line, zero, joined);
    else
      both ? d.lines_of<2, false>(line, zero, joined) : d.lines_of<1, false>(line, zero, joined);
  }
  return macs;
}
#endif

}  // namespace
