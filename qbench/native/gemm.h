// Convolutions and linear layers as products of a matrix of windows and a packed weight, finished tile by tile.
//
// A panel of rows (output pixels) is gathered from the image as centred int16, q_x - z_x, so that padding is 0 and no
// correction for the zero point of x is left. A tile of ROWS x TILE sums stays in registers while it runs down a block.

namespace {

constexpr int ROWS = 6;     // rows of a tile: 12 registers of sums on AVX2
constexpr int PANEL = 48;   // rows gathered at once: they stay in the second-level cache, the weight tile in the first

using MultiplyTile = void (*)(const int16_t* a, int64_t stride, const int8_t* w, int64_t pairs, int32_t* sums);

#ifdef QB_AVX2
template <int R>
void multiply(const int16_t* a, int64_t stride, const int8_t* w, int64_t pairs, int32_t* sums) {
  __m256i c[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) c[r][0] = c[r][1] = _mm256_setzero_si256();
  for (int64_t p = 0; p < pairs; ++p, w += 2 * TILE, a += 2) {
    const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    const __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + TILE)));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * stride, 4);
      const __m256i both = _mm256_set1_epi32(pair);
      c[r][0] = _mm256_add_epi32(c[r][0], _mm256_madd_epi16(both, w0));
      c[r][1] = _mm256_add_epi32(c[r][1], _mm256_madd_epi16(both, w1));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * TILE), c[r][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * TILE + 8), c[r][1]);
  }
}
#else
template <int R>
void multiply(const int16_t* a, int64_t stride, const int8_t* w, int64_t pairs, int32_t* sums) {
  uint32_t c[R][TILE] = {};  // sums without the correction for zero points may wrap; with it they are exact
  for (int64_t p = 0; p < pairs; ++p, w += 2 * TILE, a += 2)
    for (int r = 0; r < R; ++r) {
      const int32_t first = a[r * stride], second = a[r * stride + 1];
      for (int j = 0; j < TILE; ++j) c[r][j] += uint32_t(first * w[2 * j] + second * w[2 * j + 1]);
    }
  std::memcpy(sums, c, sizeof c);
}
#endif

// `rounds` times as many products as fit into the registers of a tile, nothing read: returns how many, 0 for none.
int64_t peak(int64_t rounds) {
#ifdef QB_AVX2
  __m256i a = _mm256_set1_epi16(3), c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, t0, t1;
  c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = c8 = c9 = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; ++round)  // by hand: a compiler would keep an array of sums in memory
    asm volatile(
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %0, %0\n vpaddd %11, %1, %1\n"
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %2, %2\n vpaddd %11, %3, %3\n"
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %4, %4\n vpaddd %11, %5, %5\n"
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %6, %6\n vpaddd %11, %7, %7\n"
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %8, %8\n vpaddd %11, %9, %9\n"
        : "+x"(c0), "+x"(c1), "+x"(c2), "+x"(c3), "+x"(c4), "+x"(c5), "+x"(c6), "+x"(c7), "+x"(c8), "+x"(c9),
          "=&x"(t0), "=&x"(t1)
        : "x"(a));
  return rounds * 10 * 16;
#else
  (void)rounds;
  return 0;
#endif
}

constexpr MultiplyTile MULTIPLY[ROWS + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,
                                             multiply<4>, multiply<5>, multiply<6>};

// `count` codes as int16 less their zero point; floats as they are.
inline void centre(const uint8_t* x, int64_t count, int16_t zero_point, int16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = int16_t(x[i] - zero_point);
}
inline void centre(const float* x, int64_t count, int16_t, float* out) { std::memcpy(out, x, count * sizeof(float)); }

// The shape of one layer's product, and how a panel is gathered for it.
struct Product {
  const Weight& weight;
  const Finish& finish;
  const Window& window;
  const Rows& rows;
  const Operands& operands;
  int64_t blocks, tiles, stride, pixels, total, per_group;
  bool lines;  // taps side by side are inputs side by side

  Product(const Weight& w, const Finish& f, const Window& v, const Rows& r, const Operands& o)
      : weight(w), finish(f), window(v), rows(r), operands(o) {
    blocks = (w.depth + w.block_depth - 1) / w.block_depth;
    tiles = (w.outputs + TILE - 1) / TILE;
    stride = blocks * block_stride();
    pixels = v.out_height * v.out_width;
    total = o.samples * pixels;
    per_group = v.channels / w.groups;
    lines = w.groups == 1 && blocks == 1 && v.dilation_width == 1;
  }

  int64_t block_stride() const { return rounded_up(weight.block_depth, 2); }
  int64_t depth_of(int64_t block) const {
    return std::min(weight.block_depth, weight.depth - block * weight.block_depth);
  }

  // The bytes of the packed weight before a block's tile of a group.
  const int8_t* tile_of(int64_t group, int64_t block, int64_t tile) const {
    const int64_t full = tiles * rounded_up(weight.block_depth, 2) * TILE;
    const int64_t last = tiles * rounded_up(depth_of(blocks - 1), 2) * TILE;
    const int64_t of_group = (blocks - 1) * full + last;
    return weight.values + group * of_group + block * full + tile * rounded_up(depth_of(block), 2) * TILE;
  }

  int16_t zero_point_of(int64_t row) const { return int16_t(rows.zero_points[row / rows.pixels]); }

  // The window of output pixel `row`, inputs of `group`, as [blocks][block_stride]: centred int16 from codes, or floats.
  template <class In, class Out>
  void gather(int64_t row, int64_t group, Out* out) const {
    const int16_t zero_point = rows.zero_points ? zero_point_of(row) : int16_t(0);
    const int64_t sample = row / pixels, pixel = row % pixels;
    const int64_t top = pixel / window.out_width * window.stride_height - window.padding_height;
    const int64_t left = pixel % window.out_width * window.stride_width - window.padding_width;
    const In* image = static_cast<const In*>(operands.x) +
                      sample * window.height * window.width * window.channels + group * per_group;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * window.block, count = std::min(window.block, per_group - first);
      Out* at = out + block * block_stride();
      for (int64_t i = 0; i < window.kernel_height; ++i) {
        const int64_t y = top + i * window.dilation_height;
        if (lines && y >= 0 && y < window.height) {  // a row of the kernel lies in one piece
          const int64_t from = std::clamp<int64_t>(-left, 0, window.kernel_width);
          const int64_t to = std::clamp<int64_t>(window.width - left, from, window.kernel_width);
          std::memset(at, 0, from * count * sizeof(Out));
          centre(image + (y * window.width + left + from) * window.channels, (to - from) * count, zero_point,
                 at + from * count);
          std::memset(at + to * count, 0, (window.kernel_width - to) * count * sizeof(Out));
          at += window.kernel_width * count;
          continue;
        }
        for (int64_t j = 0; j < window.kernel_width; ++j, at += count) {
          const int64_t x = left + j * window.dilation_width;
          if (y >= 0 && y < window.height && x >= 0 && x < window.width)
            centre(image + (y * window.width + x) * window.channels + first, count, zero_point, at);
          else
            std::memset(at, 0, count * sizeof(Out));
        }
      }
      if (depth_of(block) % 2) *at = 0;
    }
  }
};

// Turns the sums of one tile into results: rows [first, first + count) of the panel, TILE outputs of a group.
struct TileFinisher {
  const Product& p;
  int64_t group, tile, offset, outputs;

  TileFinisher(const Product& product, int64_t g, int64_t t) : p(product), group(g), tile(t) {
    offset = (group * p.tiles + tile) * TILE;
    outputs = std::min<int64_t>(TILE, p.weight.outputs - tile * TILE);
  }

  int64_t place(int64_t row) const {  // of the first output in the result
    return row * p.weight.groups * p.weight.outputs + group * p.weight.outputs + tile * TILE;
  }

  void begin(int64_t row, int count, float (*t)[TILE]) const {
    for (int r = 0; r < count; ++r) {
      for (int j = 0; j < TILE; ++j) t[r][j] = p.finish.start ? p.finish.start[offset + j] : 0.0f;
      if (p.operands.add)
        for (int64_t j = 0; j < outputs; ++j) t[r][j] = p.operands.add[place(row + r) + j];
    }
  }

  // t += f32(sum) * multiplier, the first block without a start: t = f32(sum) * multiplier.
  void block(int64_t row, int count, int64_t b, const int32_t* sums, const int32_t* row_sums, float (*t)[TILE]) const {
    const int64_t all = p.weight.groups * p.tiles * TILE;
    const float* m = p.finish.multiplier + b * all + offset;
    const int32_t* zero = p.weight.zero_points ? p.weight.zero_points + b * all + offset : nullptr;
    const int32_t* bias = p.finish.bias ? p.finish.bias + offset : nullptr;
    const bool fresh = b == 0 && !p.finish.start && !p.operands.add;
    for (int r = 0; r < count; ++r) {
      uint32_t wrapping[TILE];
      for (int j = 0; j < TILE; ++j) wrapping[j] = uint32_t(sums[r * TILE + j]);
      if (zero)
        for (int j = 0; j < TILE; ++j) wrapping[j] -= uint32_t(zero[j]) * uint32_t(row_sums[r]);
      if (bias)
        for (int j = 0; j < TILE; ++j) wrapping[j] += uint32_t(bias[j]);
      int32_t acc[TILE];
      for (int j = 0; j < TILE; ++j) acc[j] = int32_t(wrapping[j]);
      float term[TILE];
      if (p.rows.scales) {
        const float scale = p.rows.scales[(row + r) / p.rows.pixels];
        for (int j = 0; j < TILE; ++j) term[j] = float(acc[j]) * (scale * m[j]);
      } else {
        for (int j = 0; j < TILE; ++j) term[j] = float(acc[j]) * m[j];
      }
      if (fresh)
        for (int j = 0; j < TILE; ++j) t[r][j] = term[j];
      else
        for (int j = 0; j < TILE; ++j) t[r][j] += term[j];
    }
  }

  void end(int64_t row, int count, float (*t)[TILE]) const {
    for (int r = 0; r < count; ++r) {
      const int64_t at = place(row + r);
      if (p.operands.residual) {
        const uint8_t* residual = p.operands.residual + at;
        for (int64_t j = 0; j < outputs; ++j)
          t[r][j] += float(residual[j] - p.finish.residual_zero_point) * p.finish.residual_multiplier;
      }
      if (p.finish.to_float)
        floats(t[r], static_cast<float*>(p.operands.y) + at);
      else
        codes(t[r], static_cast<uint8_t*>(p.operands.y) + at);
    }
  }

  void codes(const float* t, uint8_t* y) const {
    const float low = float(p.finish.q_min - p.finish.zero_point), high = float(p.finish.q_max - p.finish.zero_point);
    uint8_t whole[TILE];
    for (int j = 0; j < TILE; ++j) whole[j] = uint8_t(rounded(t[j], low, high) + p.finish.zero_point);
    std::memcpy(y, whole, outputs);
  }

  void floats(const float* t, float* y) const {
    float whole[TILE];
    for (int j = 0; j < TILE; ++j) {
      const float v = p.finish.last ? t[j] + p.finish.last[offset + j] : t[j];
      const float raised = v < p.finish.low ? p.finish.low : v;  // NaN stays NaN, as torch's clamp has it
      whole[j] = raised > p.finish.high ? p.finish.high : raised;
    }
    std::memcpy(y, whole, outputs * sizeof(float));
  }
};

// Rows [first, first + count) of the product, tiles [from, to) of each group.
void panel(const Product& p, int64_t first, int64_t count, int64_t from, int64_t to, int16_t* a, int32_t* row_sums) {
  for (int64_t group = 0; group < p.weight.groups; ++group) {
    for (int64_t r = 0; r < count; ++r) p.gather<uint8_t>(first + r, group, a + r * p.stride);
    if (p.weight.zero_points)
      for (int64_t b = 0; b < p.blocks; ++b)
        for (int64_t r = 0; r < count; ++r) {
          const int16_t* at = a + r * p.stride + b * p.block_stride();
          int32_t sum = 0;
          for (int64_t k = 0; k < p.depth_of(b); ++k) sum += at[k];
          row_sums[b * PANEL + r] = sum;
        }
    for (int64_t tile = from; tile < to; ++tile) {
      const TileFinisher finisher(p, group, tile);
      for (int64_t r = 0; r < count; r += ROWS) {
        const int height = int(std::min<int64_t>(ROWS, count - r));
        float t[ROWS][TILE];
        finisher.begin(first + r, height, t);
        for (int64_t b = 0; b < p.blocks; ++b) {
          alignas(32) int32_t sums[ROWS * TILE];
          MULTIPLY[height](a + r * p.stride + b * p.block_stride(), p.stride, p.tile_of(group, b, tile),
                           (p.depth_of(b) + 1) / 2, sums);
          finisher.block(first + r, height, b, sums, row_sums + b * PANEL + r, t);
        }
        finisher.end(first + r, height, t);
      }
    }
  }
}

int64_t layer(const Weight& weight, const Finish& finish, const Window& window, const Rows& rows,
              const Operands& operands) {
  const Product p(weight, finish, window, rows, operands);
  const int64_t macs = p.total * weight.groups * weight.outputs * weight.depth;
  const int threads = threads_for(macs, WORTH_A_THREAD);
  const int64_t panels = (p.total + PANEL - 1) / PANEL;
  // Few rows: each thread takes some of the outputs of every panel.
  const int64_t parts = panels >= threads ? 1 : std::min<int64_t>(threads, p.tiles);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
  for (int64_t index = 0; index < panels; ++index)
    for (int64_t part = 0; part < parts; ++part) {
      static thread_local Scratch gathered, summed;
      int16_t* a = gathered.of<int16_t>(PANEL * p.stride);
      int32_t* row_sums = summed.of<int32_t>(PANEL * p.blocks);
      const int64_t first = index * PANEL, count = std::min<int64_t>(PANEL, p.total - first);
      panel(p, first, count, part * p.tiles / parts, (part + 1) * p.tiles / parts, a, row_sums);
    }
  return macs;
}

}  // namespace
