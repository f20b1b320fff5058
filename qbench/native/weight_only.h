// Float inputs times an int8 weight.
//
// No window is gathered: for each tap a row of the result has a pointer to its inputs, or to zeros where the window
// leaves the image. Many rows: some products of up to FLOAT_TILES tiles of the weight at a time are read back as float32
// and multiplied with all rows of a panel while the first caches hold them. Few rows: the weight is read back in registers.
// A scale multiplies the sum of a block, or of as much of it as is read back at once.

namespace {

#if defined(QB_AVX512)
constexpr int LANES = 16, FLOAT_TILES = 4;  // 24 registers of sums
#elif defined(QB_AVX2)
constexpr int LANES = 8, FLOAT_TILES = 1;  // 12 registers of sums
#else
constexpr int LANES = 4, FLOAT_TILES = 1;
#endif
constexpr int FLOAT_ROWS = 6, PER_TILE = TILE / LANES;
constexpr int64_t FEW = 6;              // rows, up to which the weight is read back in registers
constexpr int64_t READ_AT_ONCE = 256;   // products: 64 KiB of float32 at most
constexpr int64_t FLOAT_PANEL = 192;    // rows, at most

typedef float Lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef int32_t Whole __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(1), may_alias));

inline Lanes& floats_at(float* x) { return *reinterpret_cast<Lanes*>(x); }
inline const Lanes& floats_at(const float* x) { return *reinterpret_cast<const Lanes*>(x); }

inline Lanes all_lanes(float v) {
#if defined(QB_AVX512)
  return Lanes(_mm512_set1_ps(v));
#elif defined(QB_AVX2)
  return Lanes(_mm256_set1_ps(v));
#else
  return Lanes{v, v, v, v};
#endif
}

// a * b + c, rounded once where there is an instruction for it.
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(QB_AVX512)
  return Lanes(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(QB_AVX2)
  return Lanes(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

// An int8 in the low byte of each word becomes the low bits of a float32's mantissa, its sign bit turned over: with the
// exponent of 2^23 that is 2^23 + 128 + q, from which a subtraction leaves q - zero point, exactly. The second byte, with
// the exponent of 2^15, is 2^15 + 128 + q.
constexpr uint32_t MASKS[2] = {0xFFu, 0xFF00u}, EXPONENTS[2] = {0x4B000080u, 0x47008000u};
constexpr float OFFSETS[2] = {8388608.0f + 128.0f, 32768.0f + 128.0f};

template <int BYTE>
inline Lanes value_of(Words v, Lanes offset) {
  return __builtin_bit_cast(Lanes, Words((v & MASKS[BYTE]) ^ EXPONENTS[BYTE])) - offset;
}

// PACKED products of LANES outputs.
inline Words packed_products(const int8_t* w) {
#if defined(QB_VNNI)
  return *reinterpret_cast<const Words*>(w);
#elif defined(QB_AVX2)
  return Words(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));  // g++ 12 does halves in the next
#else
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(w), Words);
#endif
}

// What is subtracted from the values of C tiles.
template <int C>
struct Offsets {
  Lanes of[2][C * PER_TILE];
  explicit Offsets(const int32_t* zero_points) {
    for (int n = 0; n < C * PER_TILE; ++n) {
      Lanes zeros = {};
      if (zero_points) zeros = __builtin_convertvector(*reinterpret_cast<const Whole*>(zero_points + n * LANES), Lanes);
      for (int b = 0; b < 2; ++b) of[b][n] = zeros + OFFSETS[b];
    }
  }
};

// Products of one tap whose inputs and weights lie side by side: from `channel` on in the image (of a group), from
// `position` on in a block of the packed weight.
struct Piece {
  int64_t tap, channel, count, position;
};

// Pieces [first, last), `products` in all, of a block.
struct Chunk {
  int64_t block, first, last, products;
};

struct Pieced {
  std::vector<Piece> pieces;
  std::vector<Chunk> chunks;
  bool aligned;       // every piece begins with a whole group of PACKED products
  bool in_registers;  // a chunk is a block, read back in registers

  // Chunks of at most `most` products.
  void of(const Product& p, int64_t most) {
    pieces.clear(), chunks.clear();
    aligned = true;
    const Window& v = p.window;
    for (int64_t block = 0; block < p.blocks; ++block) {
      const int64_t channel = block * v.block, count = std::min(v.block, p.per_group - channel);
      const int64_t segment = std::min(p.weight.segment, p.depth_of(block));
      chunks.push_back({block, int64_t(pieces.size()), int64_t(pieces.size()), 0});
      for (int64_t tap = 0; tap < v.kernel_height * v.kernel_width; ++tap)
        for (int64_t from = 0; from < count;) {
          if (chunks.back().products == most)
            chunks.push_back({block, int64_t(pieces.size()), int64_t(pieces.size()), 0});
          Chunk& chunk = chunks.back();
          const int64_t some = std::min(count - from, most - chunk.products), k = tap * count + from;
          pieces.push_back({tap, channel + from, some, k / segment * room_of(segment) + k % segment});
          aligned = aligned && pieces.back().position % PACKED == 0;
          chunk.products += some, ++chunk.last;
          from += some;
        }
    }
  }
};

// For each tap and row of a panel a pointer to the inputs of its pixel: at[tap * count + r].
struct Inputs {
  const float** at;
  int64_t count;

  Inputs(const Product& p, int64_t first, int64_t rows) : count(rows) {
    static thread_local Scratch pointers, outside;
    const Window& v = p.window;
    at = pointers.of<const float*>(v.kernel_height * v.kernel_width * count);
    float* none = outside.of<float>(v.channels);
    if (!none) at = nullptr;
    if (!at) return;  // there is no memory left
    const float* zeros = nullptr;
    int64_t sample = first / p.pixels, y = first % p.pixels / v.out_width, x = first % v.out_width;
    for (int64_t r = 0; r < count; ++r) {
      const float* image = static_cast<const float*>(p.operands.x) + sample * v.height * v.width * v.channels;
      const float** to = at + r;
      for (int64_t i = 0; i < v.kernel_height; ++i) {
        const int64_t row = y * v.stride_height - v.padding_height + i * v.dilation_height;
        for (int64_t j = 0; j < v.kernel_width; ++j, to += count) {
          const int64_t column = x * v.stride_width - v.padding_width + j * v.dilation_width;
          if (row >= 0 && row < v.height && column >= 0 && column < v.width) {
            *to = image + (row * v.width + column) * v.channels;
          } else {
            if (!zeros) {
              std::fill(none, none + v.channels, 0.0f);
              zeros = none;
            }
            *to = zeros;
          }
        }
      }
      if (++x == v.out_width) {
        x = 0;
        if (++y == v.out_height) y = 0, ++sample;
      }
    }
  }
};

// A chunk of C tiles, `tile_stride` bytes apart, as float32 [products][C * TILE], not scaled yet.
template <int C>
void read_back(const Piece* pieces, int64_t count, const int8_t* w, int64_t tile_stride, const int32_t* zero_points,
               float* out) {
  constexpr int N = C * PER_TILE;
  const Offsets<C> offsets(zero_points);
  const auto at = [=](int64_t group, int n) {
    return packed_products(w + n / PER_TILE * tile_stride + group * PACKED * TILE + n % PER_TILE * LANES * PACKED);
  };
  for (const Piece* piece = pieces; piece < pieces + count; ++piece) {
    int64_t k = piece->position;
    const int64_t end = k + piece->count;
    const auto one = [&] {
      for (int n = 0; n < N; ++n, out += LANES)
        floats_at(out) = value_of<0>(at(k / PACKED, n) >> uint32_t(8 * (k % PACKED)), offsets.of[0][n]);
      ++k;
    };
    while (k < end && k % PACKED) one();
    for (; k + PACKED <= end; k += PACKED, out += PACKED * N * LANES)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        Words v = at(k / PACKED, n);
#pragma GCC unroll 2
        for (int half = 0; half < int(PACKED) / 2; ++half, v >>= 16) {
          floats_at(out + ((2 * half) * N + n) * LANES) = value_of<0>(v, offsets.of[0][n]);
          floats_at(out + ((2 * half + 1) * N + n) * LANES) = value_of<1>(v, offsets.of[1][n]);
        }
      }
    while (k < end) one();
  }
}

// t[r] += scales * (row r times the weight of C tiles), over some pieces; t is 0 where `fresh`.
template <int R, int C>
void multiply_floats(const Inputs& inputs, int64_t row, int64_t group, const Piece* pieces, int64_t count, const float* w,
                     const float* scales, bool fresh, float* t) {
  constexpr int N = C * PER_TILE;
  Lanes c[R][N] = {};
  for (const Piece* piece = pieces; piece < pieces + count; ++piece) {
    const float* x[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) x[r] = inputs.at[piece->tap * inputs.count + row + r] + group + piece->channel;
    for (int64_t k = 0; k < piece->count; ++k, w += C * TILE) {
      Lanes b[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) b[n] = floats_at(w + n * LANES);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Lanes v = all_lanes(x[r][k]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) c[r][n] = fused(v, b[n], c[r][n]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Lanes& to = floats_at(t + (r * N + n) * LANES);
      to = fused(c[r][n], floats_at(scales + n * LANES), fresh ? Lanes{} : to);
    }
}

// The same with the packed weight itself.
template <int R, int C>
void multiply_packed(const Inputs& inputs, int64_t group, const Piece* pieces, int64_t count, const int8_t* w,
                     int64_t tile_stride, const int32_t* zero_points, const float* scales, bool fresh, float* t) {
  constexpr int N = C * PER_TILE;
  // Sums apart from each other: two products begin in a cycle, each takes 4.
  constexpr int TURNS = R * N >= 8 ? 1 : R * N >= 4 ? 2 : int(PACKED);
  const Offsets<C> offsets(zero_points);
  Lanes c[TURNS][R][N] = {};
  for (const Piece* piece = pieces; piece < pieces + count; ++piece) {
    const float* x[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) x[r] = inputs.at[piece->tap * inputs.count + r] + group + piece->channel;
    const int8_t* at = w + piece->position * TILE;
    int64_t k = 0;
    for (; k + PACKED <= piece->count; k += PACKED, at += PACKED * TILE)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        Words v = packed_products(at + n / PER_TILE * tile_stride + n % PER_TILE * LANES * PACKED);
#pragma GCC unroll 2
        for (int i = 0; i < int(PACKED); i += 2, v >>= 16) {
          const Lanes first = value_of<0>(v, offsets.of[0][n]), second = value_of<1>(v, offsets.of[1][n]);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            Lanes &even = c[i % TURNS][r][n], &odd = c[(i + 1) % TURNS][r][n];
            even = fused(all_lanes(x[r][k + i]), first, even);
            odd = fused(all_lanes(x[r][k + i + 1]), second, odd);
          }
        }
      }
    for (int shift = 0; k < piece->count; ++k, shift += 8)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Words v = packed_products(at + n / PER_TILE * tile_stride + n % PER_TILE * LANES * PACKED);
        const Lanes b = value_of<0>(v >> uint32_t(shift), offsets.of[0][n]);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) c[0][r][n] = fused(all_lanes(x[r][k]), b, c[0][r][n]);
      }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Lanes& to = floats_at(t + (r * N + n) * LANES);
      Lanes sum = c[0][r][n];
#pragma GCC unroll 4
      for (int i = 1; i < TURNS; ++i) sum += c[i][r][n];
      to = fused(sum, floats_at(scales + n * LANES), fresh ? Lanes{} : to);
    }
}

using MultiplyFloats = decltype(&multiply_floats<1, 1>);
using MultiplyPacked = decltype(&multiply_packed<1, 1>);
#define QB_ROWS_OF(f, C) {f<1, C>, f<2, C>, f<3, C>, f<4, C>, f<5, C>, f<6, C>}
#if defined(QB_AVX512)
#define QB_TILES_OF(f) {QB_ROWS_OF(f, 1), QB_ROWS_OF(f, 2), QB_ROWS_OF(f, 3), QB_ROWS_OF(f, 4)}
constexpr decltype(&read_back<1>) READ_BACK[FLOAT_TILES] = {read_back<1>, read_back<2>, read_back<3>, read_back<4>};
#else
#define QB_TILES_OF(f) {QB_ROWS_OF(f, 1)}
constexpr decltype(&read_back<1>) READ_BACK[FLOAT_TILES] = {read_back<1>};
#endif
constexpr MultiplyFloats MULTIPLY_FLOATS[FLOAT_TILES][FLOAT_ROWS] = QB_TILES_OF(multiply_floats);
constexpr MultiplyPacked MULTIPLY_PACKED[FLOAT_TILES][FLOAT_ROWS] = QB_TILES_OF(multiply_packed);
#undef QB_ROWS_OF
#undef QB_TILES_OF

// The whole weight of a group as float32, band after band of FLOAT_TILES tiles: [products][tiles of the band * TILE].
void read_back_all(const Product& p, const Pieced& list, float* out) {
  for (int64_t tile = 0; tile < p.tiles; tile += FLOAT_TILES) {
    const int wide = int(std::min<int64_t>(FLOAT_TILES, p.tiles - tile));
    for (const Chunk& chunk : list.chunks) {
      const int64_t tile_stride = p.packed_depth_of(chunk.block) * TILE;
      const int64_t constants = (chunk.block * p.tiles + tile) * TILE;
      READ_BACK[wide - 1](list.pieces.data() + chunk.first, chunk.last - chunk.first, p.tile_of(0, chunk.block, tile),
                          tile_stride, p.weight.zero_points ? p.weight.zero_points + constants : nullptr, out);
      out += chunk.products * wide * TILE;
    }
  }
}

// Rows [first, first + count) of the product, tiles [from, to) of each group; `ready` is what read_back_all made of the
// weight, or none.
void float_panel(const Product& p, const Pieced& list, const float* scales, int64_t first, int64_t count, int64_t from,
                 int64_t to, const float* ready = nullptr) {
  static thread_local Scratch placed, summed, read;
  const Inputs inputs(p, first, count);
  int64_t* places = placed.of<int64_t>(count);
  float* t = summed.of<float>(count * FLOAT_TILES * TILE);
  float* w = read.of<float>(READ_AT_ONCE * FLOAT_TILES * TILE);
  if (!inputs.at || !places || !t || !w) return;
  for (int64_t r = 0; r < count; ++r) places[r] = p.place_of(first + r);
  const int64_t turns = (count + FLOAT_ROWS - 1) / FLOAT_ROWS;
  for (int64_t group = 0; group < p.weight.groups; ++group)
    for (int64_t tile = from; tile < to; tile += FLOAT_TILES) {
      const int wide = int(std::min<int64_t>(FLOAT_TILES, to - tile));
      const Finisher finisher(p.weight, p.finish, p.rows, p.operands, p.tiles, group, tile, wide, false, places);
      bool fresh = !p.finish.start && !p.operands.add && !list.chunks.empty();
      if (!fresh) finisher.begin(count, t);
      const float* of_band = ready ? ready + p.weight.depth * tile * TILE : w;
      for (const Chunk& chunk : list.chunks) {
        const int64_t constants = (chunk.block * p.weight.groups + group) * p.tiles * TILE + tile * TILE;
        const int32_t* zero_points = p.weight.zero_points ? p.weight.zero_points + constants : nullptr;
        const int8_t* packed = p.tile_of(group, chunk.block, tile);
        const int64_t tile_stride = p.packed_depth_of(chunk.block) * TILE;
        const Piece* pieces = list.pieces.data() + chunk.first;
        const int64_t many = chunk.last - chunk.first, shift = group * p.per_group;
        if (list.in_registers) {
          MULTIPLY_PACKED[wide - 1][count - 1](inputs, shift, pieces, many, packed, tile_stride, zero_points,
                                               scales + constants, fresh, t);
          fresh = false;
          continue;
        }
        if (!ready) READ_BACK[wide - 1](pieces, many, packed, tile_stride, zero_points, w);
        for (int64_t turn = 0; turn < turns; ++turn) {
          const int64_t row = turn * count / turns, rows = (turn + 1) * count / turns - row;
          MULTIPLY_FLOATS[wide - 1][rows - 1](inputs, row, shift, pieces, many, of_band, scales + constants,
                                              fresh, t + row * wide * TILE);
        }
        if (ready) of_band += chunk.products * wide * TILE;
        fresh = false;
      }
      finisher.end(count, t);
    }
}

// How many panels the rows of a product are divided into, and into how many parts its tiles, for `threads`.
void divided(const Product& p, int threads, int64_t& panels, int64_t& parts) {
  const int64_t bands = (p.tiles + FLOAT_TILES - 1) / FLOAT_TILES;
  const int64_t in_cache = std::clamp<int64_t>((1 << 18) / std::max<int64_t>(p.window.channels, 1), 48, FLOAT_PANEL);
  panels = (p.total + in_cache - 1) / in_cache;
  parts = panels < threads ? std::min<int64_t>(threads, bands) : 1;
  if (panels >= threads) panels = rounded_up(panels, threads);
}

// How the products of few rows, or many, are divided.
void pieces_of(const Product& p, Pieced& made) {
  made.in_registers = p.total <= FEW;
  if (made.in_registers) made.of(p, INT64_MAX);
  if (!made.in_registers || !made.aligned) made.of(p, READ_AT_ONCE), made.in_registers = false;
}

int64_t weight_only(const Weight& weight, const float* scales, const Finish& finish, const Window& window,
                    const Operands& operands) {
  const Rows none{nullptr, nullptr, INT64_MAX};
  const Product p(weight, finish, window, none, operands);
  static thread_local Pieced made;
  pieces_of(p, made);
  const Pieced& list = made;
  const int64_t macs = p.total * weight.groups * weight.outputs * weight.depth;
  const int threads = threads_for(macs, WORTH_A_THREAD);
  int64_t panels, parts;
  divided(p, threads, panels, parts);
  const int64_t bands = (p.tiles + FLOAT_TILES - 1) / FLOAT_TILES;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
  for (int64_t index = 0; index < panels; ++index)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = index * p.total / panels, last = (index + 1) * p.total / panels;
      float_panel(p, list, scales, first, last - first, part * bands / parts * FLOAT_TILES,
                  std::min((part + 1) * bands / parts * FLOAT_TILES, p.tiles));
    }
  return macs;
}

int64_t weight_only_transposed(const Weight* weights, const float* scales, const Finish& finish, const Window* windows,
                               const Operands& operands, int64_t phases, int64_t taps) {
  for (int64_t phase = 0; phase < phases; ++phase) weight_only(weights[phase], scales, finish, windows[phase], operands);
  const Window& v = windows[0];
  return operands.samples * v.height * v.width * v.channels * taps * weights[0].outputs;
}

// Pixels [first, first + count) of a depthwise convolution, four at once; the weight [taps][channels] TILE channels at a
// time.
void depthwise_floats(const Product& p, const int8_t* weight, const int32_t* zero_points, const float* scales,
                      const float* bias, int64_t first, int64_t count) {
  static thread_local Scratch read;
  const int64_t channels = p.window.channels, taps = p.window.kernel_height * p.window.kernel_width;
  const Inputs inputs(p, first, count);
  float* w = read.of<float>(taps * TILE);
  if (!inputs.at || !w) return;
  float* y = static_cast<float*>(p.operands.y) + first * channels;
  for (int64_t c = 0; c < channels; c += TILE) {
    const int64_t some = channels - c;
    const Ints zeros = zero_points ? taken<Ints>(zero_points + c, some) : Ints{};
    const Floats scale = taken<Floats>(scales + c, some), start = bias ? taken<Floats>(bias + c, some) : Floats{};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Bytes raised = taken<Bytes>(weight + tap * channels + c, some) ^ uint8_t(0x80);  // q + 128
      set_lanes(w + tap * TILE, to_floats(to_ints(raised) - 128 - zeros) * scale);
    }
    const auto pixels = [&](auto many, const auto& load, int64_t r) __attribute__((always_inline)) {
      constexpr int P = decltype(many)::value;
      Lanes sums[P][PER_TILE];
      for (int i = 0; i < P; ++i)
        for (int n = 0; n < PER_TILE; ++n) std::memcpy(&sums[i][n], reinterpret_cast<const float*>(&start) + n * LANES, sizeof(Lanes));
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* const* at = inputs.at + tap * count + r;
#pragma GCC unroll 4
        for (int n = 0; n < PER_TILE; ++n) {
          const Lanes b = floats_at(w + tap * TILE + n * LANES);
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i) sums[i][n] = fused(load(at[i] + c, n), b, sums[i][n]);
        }
      }
      for (int i = 0; i < P; ++i) {
        float* to = y + (r + i) * channels + c;
        if (some >= TILE) {
          for (int n = 0; n < PER_TILE; ++n) floats_at(to + n * LANES) = sums[i][n];
        } else {
          std::memcpy(to, sums[i], some * sizeof(float));
        }
      }
    };
    const auto whole = [](const float* x, int n) { return floats_at(x + n * LANES); };
    const auto rest = [some](const float* x, int n) {
      float v[TILE] = {};
      std::memcpy(v, x, some * sizeof(float));
      return floats_at(v + n * LANES);
    };
    int64_t r = 0;
    if (some >= TILE) {
      for (; r + 4 <= count; r += 4) pixels(std::integral_constant<int, 4>{}, whole, r);
      for (; r < count; ++r) pixels(std::integral_constant<int, 1>{}, whole, r);
    } else {
      for (; r < count; ++r) pixels(std::integral_constant<int, 1>{}, rest, r);
    }
  }
}

int64_t weight_only_depthwise(const int8_t* weight, const int32_t* zero_points, const float* scales, const float* bias,
                              const Window& window, const Operands& operands) {
  const int64_t channels = window.channels, taps = window.kernel_height * window.kernel_width;
  const Weight shape{nullptr, nullptr, nullptr, 1, channels, taps, taps, taps};
  const Finish finish{};
  const Rows none{nullptr, nullptr, INT64_MAX};
  const Product p(shape, finish, window, none, operands);
  const int64_t macs = p.total * channels * taps;
  const int threads = threads_for(macs, WORTH_A_THREAD);
  int64_t panels = (p.total + FLOAT_PANEL - 1) / FLOAT_PANEL;
  panels = std::min(p.total, rounded_up(panels, threads));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t index = 0; index < panels; ++index) {
    const int64_t first = index * p.total / panels, last = (index + 1) * p.total / panels;
    depthwise_floats(p, weight, zero_points, scales, bias, first, last - first);
  }
  return macs;
}

}  // namespace
