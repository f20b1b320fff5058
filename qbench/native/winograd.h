// Convolutions of 3 x 3 taps by Winograd's minimal filtering F(4 x 4, 3 x 3) (Lavin and Gray, arXiv 1509.09308), in exact
// integers: 4 x 4 outputs take 36 products of an input channel, where the taps take 144.
//
// Inputs d of 6 x 6 pixels and taps g become B d B' and G g G', are multiplied point by point, summed over the channels, and
// lead back to the outputs by A and A'. With G times 24 all of it is whole: of B and A as published, rows 1 and 2 of G are
// divided by -4, which A makes up for, and row 5 by 4. |B d B'| <= 100 * 255 and |G g G'| <= 49 * 255 fit into int16. The
// outputs come out as y * 9 * 2^n, n <= 6, modulo 2^32: exact where |y| < 2^25.

namespace {

struct Winograd {
  static constexpr int64_t SIDE = 4, MET = 6, POINTS = MET * MET;  // outputs and inputs of a tile along an axis
  static constexpr int64_t MOST = 6 * ROWS, TOGETHER = 3;          // tiles that are multiplied, and finished, at once
  static constexpr int64_t POINT = MOST * WIDE * TILE + 16;        // sums of a point
  static constexpr uint32_t NINTH = 954437177;                     // modulo 2^32

#if defined(QB_AVX512)
  typedef uint16_t Words __attribute__((vector_size(64)));  // of channels side by side
#elif defined(QB_AVX2)
  typedef uint16_t Words __attribute__((vector_size(32)));
#else
  typedef uint16_t Words __attribute__((vector_size(16)));
#endif
  typedef uint32_t Values __attribute__((vector_size(sizeof(Words))));  // of outputs side by side
  static constexpr int64_t CHANNELS = sizeof(Words) / 2, OUTPUTS = sizeof(Values) / 4;

  const Product& p;
  int64_t room;   // of the channels of a pixel among the transformed inputs
  int64_t depth;  // of a tile of outputs in the packed weight
  int64_t down, across;  // tiles

  explicit Winograd(const Product& product) : p(product) {
    room = rounded_up(p.window.channels, CHANNELS);
    depth = rounded_up(p.window.channels, 2);
    down = (p.window.out_height + SIDE - 1) / SIDE;
    across = (p.window.out_width + SIDE - 1) / SIDE;
  }

  // Along one axis: 6 inputs to 6 points.
  static void spread(const Words (&d)[MET], Words (&t)[MET]) {
    const Words outer = d[4] - d[2], inner = d[3] - d[1], twice = inner << 1;
    const Words even = d[4] - (d[2] << 2), odd = d[3] - (d[1] << 2);
    t[0] = ((d[0] - d[2]) << 2) + outer;
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = outer + twice;
    t[4] = outer - twice;
    t[5] = d[5] - d[3] - (twice << 1);
  }

  // 6 points to 4 outputs, times 24, 12, 6 and 6.
  template <class V>
  static void gather(const V (&m)[MET], V (&y)[SIDE]) {
    const V s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = m[0] + (s1 << 2) + s2;
    y[1] = (d1 << 1) + d2;
    y[2] = s1 + s2;
    y[3] = d1 + (d2 << 1) + m[5];
  }

  // What `tiles` keeps for each of them: transformed inputs and sums.
  int64_t bytes_a_tile() const { return POINTS * (room * 2 + std::min<int64_t>(WIDE, p.tiles) * TILE * 4); }

  // Tiles [first, first + count) of all samples.
  void tiles(int64_t first, int64_t count) const {
    static thread_local Scratch spread_out, multiplied;
    const int64_t point = count * room + 32;  // no power of two apart
    int16_t* inputs = spread_out.of<int16_t>(POINTS * point);
    int32_t* sums = multiplied.of<int32_t>(POINTS * POINT);
    if (!inputs || !sums) return;
    spread_inputs(first, count, inputs, point);
    for (int64_t tile = 0; tile < p.tiles; tile += WIDE) {
      const int wide = int(std::min<int64_t>(WIDE, p.tiles - tile));
      for (int64_t i = 0; i < POINTS; ++i)
        multiply<int16_t>(count, wide, {reinterpret_cast<const Code*>(inputs + i * point), room * CODES_A_WORD, nullptr},
                          p.weight.values + (i * p.tiles + tile) * depth * TILE * 2, depth * TILE * 2, depth * CODES_A_WORD,
                          sums + i * POINT);
      finish(first, count, tile, wide, sums);
    }
  }

  // inputs [POINTS][point], of these [count][room]
  void spread_inputs(int64_t first, int64_t count, int16_t* inputs, int64_t point) const {
    static thread_local Scratch padded_tile;
    const Window& v = p.window;
    const int64_t line = v.width * v.channels;
    uint8_t* patch = padded_tile.of<uint8_t>(POINTS * v.channels);
    if (!patch) return;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t sample = (first + t) / (down * across);
      const int64_t y = (first + t) / across % down * SIDE - v.padding_height;
      const int64_t x = (first + t) % across * SIDE - v.padding_width;
      const uint8_t* image = static_cast<const uint8_t*>(p.operands.x) + sample * v.height * line;
      const bool inside = y >= 0 && y + MET <= v.height && x >= 0 && x + MET <= v.width;
      if (!inside) copy_padded(image, y, x, p.zero_point_of(sample * p.pixels), patch);
      const uint8_t* from = inside ? image + y * line + x * v.channels : patch;
      for (int64_t c = 0; c < v.channels; c += CHANNELS)
        spread_tile(from + c, inside ? line : MET * v.channels, v.channels - c, inputs + t * room + c, point);
    }
  }

  // The inputs of a tile that begins at (y, x), padding among them: patch [MET][MET][channels].
  void copy_padded(const uint8_t* image, int64_t y, int64_t x, int16_t zero_point, uint8_t* patch) const {
    const Window& v = p.window;
    const int64_t from = std::clamp<int64_t>(-x, 0, MET), to = std::clamp<int64_t>(v.width - x, from, MET);
    for (int64_t i = 0; i < MET; ++i, ++y, patch += MET * v.channels) {
      std::memset(patch, zero_point, MET * v.channels);
      if (y >= 0 && y < v.height)
        std::memcpy(patch + from * v.channels, image + (y * v.width + x + from) * v.channels, (to - from) * v.channels);
    }
  }

  // CHANNELS channels of a tile, of the last `count` < CHANNELS.
  void spread_tile(const uint8_t* from, int64_t line, int64_t count, int16_t* out, int64_t point) const {
    Words points[MET][MET], t[MET];
    for (int64_t j = 0; j < MET; ++j, from += p.window.channels) {
      Words d[MET];
#pragma GCC unroll 6
      for (int64_t i = 0; i < MET; ++i) d[i] = words_at(from + i * line, count);
      spread(d, t);
#pragma GCC unroll 6
      for (int64_t i = 0; i < MET; ++i) points[i][j] = t[i];
    }
    for (int64_t i = 0; i < MET; ++i, out += MET * point) {
      spread(points[i], t);
#pragma GCC unroll 6
      for (int64_t j = 0; j < MET; ++j) copy_to(out + j * point, t[j]);
    }
  }

  static Words words_at(const uint8_t* x, int64_t count) {
#if defined(QB_AVX512)
    const __mmask32 there = count < CHANNELS ? (1u << count) - 1 : ~0u;
    return Words(_mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, x)));
#else
    uint8_t some[CHANNELS];
    if (count < CHANNELS) {
      std::memset(some, 0, CHANNELS);
      std::memcpy(some, x, count);
      x = some;
    }
#if defined(QB_AVX2)
    return Words(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#else
    Words v;
    for (int64_t j = 0; j < CHANNELS; ++j) v[j] = x[j];
    return v;
#endif
#endif
  }

  // Sums [POINTS][POINT], of these [count][wide * TILE], to results, of some tiles of one sample at once.
  void finish(int64_t first, int64_t count, int64_t tile, int wide, const int32_t* sums) const {
    static thread_local Scratch gathered, placed, totalled;
    constexpr int64_t PIXELS = TOGETHER * SIDE * SIDE;
    int32_t* outputs = gathered.of<int32_t>((PIXELS + 1) * WIDE * TILE);  // the last row is dropped
    int64_t* places = placed.of<int64_t>(PIXELS);
    float* totals = totalled.of<float>(PIXELS * WIDE * TILE);
    if (!outputs || !places || !totals) return;
    const Window& v = p.window;
    Finisher finisher(p.weight, p.finish, p.rows, p.operands, p.tiles, 0, tile, wide, true, places);
    for (int64_t t = 0; t < count;) {
      const int64_t sample = (first + t) / (down * across);
      const int64_t end = std::min({count, t + TOGETHER, (sample + 1) * down * across - first});
      int64_t kept = 0;
      for (; t < end; ++t) {
        const int64_t y = (first + t) / across % down * SIDE, x = (first + t) % across * SIDE;
        int32_t* to[SIDE * SIDE];
        for (int64_t i = 0; i < SIDE; ++i)
          for (int64_t j = 0; j < SIDE; ++j) {
            const bool inside = y + i < v.out_height && x + j < v.out_width;
            if (inside) places[kept] = p.place_of(sample * p.pixels + (y + i) * v.out_width + x + j);
            to[i * SIDE + j] = outputs + (inside ? kept++ : PIXELS) * wide * TILE;
          }
        for (int64_t j = 0; j < wide * TILE; j += OUTPUTS) gather_tile(sums + t * wide * TILE + j, to, j);
      }
      finisher.whole(sample * p.pixels, kept, outputs, nullptr, totals);  // all rows of a sample share what rows have
    }
  }

  // OUTPUTS outputs of a tile, from `output` on: to[i][output] for pixel i.
  static void gather_tile(const int32_t* sums, int32_t* const (&to)[SIDE * SIDE], int64_t output) {
    Values columns[SIDE][MET], y[SIDE];
#pragma GCC unroll 6
    for (int64_t j = 0; j < MET; ++j) {
      Values m[MET];
#pragma GCC unroll 6
      for (int64_t i = 0; i < MET; ++i) m[i] = copied_from<Values>(sums + (i * MET + j) * POINT);
      gather(m, y);
#pragma GCC unroll 4
      for (int64_t i = 0; i < SIDE; ++i) columns[i][j] = y[i];
    }
    constexpr int POWERS[SIDE] = {3, 2, 1, 1};  // of two, in 24, 12, 6 and 6
#pragma GCC unroll 4
    for (int64_t i = 0; i < SIDE; ++i) {
      gather(columns[i], y);
#pragma GCC unroll 4
      for (int64_t j = 0; j < SIDE; ++j) {
        typedef int32_t Signed __attribute__((vector_size(sizeof(Values))));
        copy_to(to[i * SIDE + j] + output, Signed(y[j] * NINTH) >> (POWERS[i] + POWERS[j]));
      }
    }
  }
};

int64_t packed_winograd_size(int64_t outputs, int64_t inputs) {
  return Winograd::POINTS * rounded_up(outputs, TILE) * rounded_up(inputs, 2) * 2;
}

// As measured: a large weight comes from afar, for each call anew.
bool winograd_pays(int64_t outputs, const Window& v) {
#if defined(QB_AMX)
  (void)outputs, (void)v;
  return false;  // tiles of bytes are
#else
#if defined(QB_VNNI)
  constexpr int64_t CHANNELS = 24, TILES = 12, TILES_OF_LARGE = 32;
#else
  constexpr int64_t CHANNELS = 16, TILES = 4, TILES_OF_LARGE = 12;
#endif
  if (std::min(v.channels, outputs) < CHANNELS) return false;
  const int64_t side = Winograd::SIDE, down = (v.out_height + side - 1) / side, across = (v.out_width + side - 1) / side;
  const bool large = packed_winograd_size(outputs, v.channels) > 2 << 20;
  return down * across >= (large ? TILES_OF_LARGE : TILES) &&
         4 * v.out_height * v.out_width >= 3 * down * side * across * side;
#endif
}

// packed [POINTS][tiles][inputs / 2][TILE][2] int16.
void pack_winograd(const int8_t* weight, const int32_t* zero_points, int64_t outputs, int64_t inputs, int8_t* packed,
                   int32_t* totals) {
  constexpr int POINTS[Winograd::MET][3] = {{6, 0, 0}, {-1, -1, -1}, {-1, 1, -1}, {1, 2, 4}, {1, -2, 4}, {0, 0, 6}};
  const int64_t all = rounded_up(outputs, TILE), depth = rounded_up(inputs, 2);
  int16_t* to = reinterpret_cast<int16_t*>(packed);
  std::memset(packed, 0, packed_winograd_size(outputs, inputs));
  std::memset(totals, 0, all * sizeof(int32_t));
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t c = 0; c < inputs; ++c) {
      int taps[3][3], half[Winograd::MET][3];
      for (int k = 0; k < 9; ++k) {
        taps[k / 3][k % 3] = weight[(o * 9 + k) * inputs + c] - (zero_points ? zero_points[o] : 0);
        totals[o] += taps[k / 3][k % 3];
      }
      for (int i = 0; i < Winograd::MET; ++i)
        for (int k = 0; k < 3; ++k)
          half[i][k] = POINTS[i][0] * taps[0][k] + POINTS[i][1] * taps[1][k] + POINTS[i][2] * taps[2][k];
      for (int i = 0; i < Winograd::MET; ++i)
        for (int j = 0; j < Winograd::MET; ++j) {
          const int value = POINTS[j][0] * half[i][0] + POINTS[j][1] * half[i][1] + POINTS[j][2] * half[i][2];
          to[(i * Winograd::MET + j) * all * depth + (o / TILE * depth + c / 2 * 2) * TILE + o % TILE * 2 + c % 2] = int16_t(value);
        }
    }
}

int64_t winograd(const Weight& weight, const Finish& finish, const Window& window, const Rows& rows,
                 const Operands& operands) {
  const Product p(weight, finish, window, rows, operands);
  if (!p.total) return 0;
  const Winograd filtering(p);
  const int64_t macs = p.total * weight.outputs * weight.depth;
  const int threads = threads_for(macs, WORTH_A_THREAD);
  constexpr int64_t CACHED = 1 << 19;  // bytes, of a second-level cache
  const int64_t tiles = operands.samples * filtering.down * filtering.across;
  const int64_t turns = (tiles + ROWS - 1) / ROWS;
  const int64_t some = std::clamp<int64_t>(CACHED / filtering.bytes_a_tile() / ROWS, 1, Winograd::MOST / ROWS);
  const int64_t works = std::min(turns, rounded_up((turns + some - 1) / some, threads));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t work = 0; work < works; ++work) {
    const int64_t first = work * turns / works * ROWS;
    filtering.tiles(first, std::min((work + 1) * turns / works * ROWS, tiles) - first);
  }
  return macs;
}

}  // namespace
