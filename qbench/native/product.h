// The product of a matrix of windows and a packed weight: its shape, how panels of it are gathered, how weights are packed.
//
// A panel of rows (output pixels) is gathered from the image, unless the rows lie one after another in it already.

namespace {

inline int32_t sum_of(const Code* a, int64_t count) {
#if defined(QB_AVX512)
  __m512i sums = _mm512_setzero_si512();
  for (; count > 0; count -= 64, a += 64) {
    const uint64_t there = count < 64 ? (1ull << count) - 1 : ~0ull;
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(there, a), _mm512_setzero_si512()));
  }
  return int32_t(_mm512_reduce_add_epi64(sums));
#else
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i];
  return sum;
#endif
}

#if defined(QB_AVX512)
constexpr int64_t ALIGNED = 64;  // rows of a panel begin at multiples of it
constexpr int64_t OVERRUN = 48;  // of `copied`, from the end of a room on
#else
constexpr int64_t ALIGNED = GROUP, OVERRUN = 0;
#endif
#if defined(QB_AMX)
constexpr int64_t PANEL = 64;  // rows gathered at once
#else
constexpr int64_t PANEL = 48;
#endif

// What a panel holds: `count` codes as int16 less their zero point, or as they are.
inline void copied(const uint8_t* x, int64_t count, int16_t zero_point, int16_t* out) {
#if defined(QB_AVX2)
  // Eight at once, the last ones with some of those before them: kernel rows are often short.
  const __m128i zero = _mm_set1_epi16(zero_point);
  const auto eight = [=](int64_t i) {
    const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + i)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_sub_epi16(codes, zero));
  };
  if (count >= 8) {
    for (int64_t i = 0; i < count - 8; i += 8) eight(i);
    return eight(count - 8);
  }
#endif
  for (int64_t i = 0; i < count; ++i) out[i] = int16_t(x[i] - zero_point);
}
inline void copied(const uint8_t* x, int64_t count, int16_t, uint8_t* out) {
#if defined(QB_AVX512)
  // Whole stores, as masked ones that cross a line of the cache are slow: up to 63 bytes behind the copy are lost.
  for (; count > 64; count -= 64, x += 64, out += 64) _mm512_storeu_si512(out, _mm512_loadu_si512(x));
  const uint64_t there = count == 64 ? ~0ull : (1ull << count) - 1;
  if (count > 32)
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi8(there, x));
  else if (count > 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_maskz_loadu_epi8(__mmask32(there), x));
  else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_maskz_loadu_epi8(__mmask16(there), x));
#else
  std::memcpy(out, x, count);
#endif
}

// And where the window leaves the image.
inline void padded(int64_t count, int16_t, int16_t* out) { std::memset(out, 0, count * sizeof(int16_t)); }
inline void padded(int64_t count, int16_t zero_point, uint8_t* out) { std::memset(out, zero_point, count); }

// The room of a segment of products in a panel and in a packed weight.
inline int64_t room_of(int64_t segment) {
  constexpr int64_t least = PACKED == 4 && GROUP > 4 ? 16 : GROUP;  // a power of two lies in one line of the cache
  int64_t room = least;
  while (room < segment && room < GROUP) room *= 2;
  return rounded_up(segment, room);
}

// Products of a block as they are packed: each segment is filled up, and then all of them.
inline int64_t packed_depth(int64_t depth, int64_t segment) {
  if (depth < segment) return rounded_up(depth, GROUP);  // the last block
  return rounded_up(depth / segment * room_of(segment), GROUP);
}

// The shape of one layer's product, and how a panel is gathered for it.
struct Product {
  const Weight& weight;
  const Finish& finish;
  const Window& window;
  const Rows& rows;
  const Operands& operands;
  int64_t blocks, tiles, stride, pixels, total, per_group;
  int64_t block_stride, last_stride;  // products of a block as they are packed, and of the last one
  bool in_place;  // a row of the panel is a pixel of the image
  bool lines;  // taps side by side are inputs side by side

  Product(const Weight& w, const Finish& f, const Window& v, const Rows& r, const Operands& o)
      : weight(w), finish(f), window(v), rows(r), operands(o) {
    blocks = (w.depth + w.block_depth - 1) / w.block_depth;
    tiles = (w.outputs + TILE - 1) / TILE;
    block_stride = packed_depth(w.block_depth, w.segment);
    last_stride = packed_depth(depth_of(blocks - 1), w.segment);
    stride = rounded_up(blocks * block_stride + OVERRUN, ALIGNED);
    pixels = v.out_height * v.out_width;
    total = o.samples * pixels;
    per_group = v.channels / w.groups;
    const bool pointwise = v.kernel_height * v.kernel_width == 1 && v.stride_height * v.stride_width == 1 &&
                           v.padding_height + v.padding_width == 0 && v.out_height == v.height && v.out_width == v.width;
    in_place = !CENTRED && pointwise && blocks == 1 && (WHOLE == 1 || v.channels % ALIGNED == 0);
    lines = w.segment == v.kernel_width * v.channels && w.groups == 1 && blocks == 1 && v.dilation_width == 1;
  }

  // May the rows be read where they lie? A tile reads whole groups of products: the last pixels must not be the image's.
  bool reads_in_place(int64_t first, int64_t count) const {
    return in_place && (first + rounded_up(count, WHOLE)) * window.channels + rounded_up(per_group, GROUP) <= total * window.channels + per_group;
  }

  int64_t depth_of(int64_t block) const {
    return std::min(weight.block_depth, weight.depth - block * weight.block_depth);
  }
  int64_t packed_depth_of(int64_t block) const { return block < blocks - 1 ? block_stride : last_stride; }

  // The bytes of the packed weight before a block's tile of a group.
  const int8_t* tile_of(int64_t group, int64_t block, int64_t tile) const {
    const int64_t of_group = (blocks - 1) * block_stride + last_stride;
    return weight.values + ((group * of_group + block * block_stride) * tiles + tile * packed_depth_of(block)) * TILE;
  }

  // Where the outputs of a row begin in the result.
  int64_t place_of(int64_t row) const { return (window.result_width ? pixel_of(row) : row) * weight.groups * weight.outputs; }

  // The pixel of the result that a row is, where the rows are some of its pixels.
  int64_t pixel_of(int64_t row) const {
    const int64_t sample = row / pixels, pixel = row % pixels;
    const int64_t y = window.first_row + pixel / window.out_width * window.step_height;
    const int64_t x = window.first_column + pixel % window.out_width * window.step_width;
    return (sample * window.result_height + y) * window.result_width + x;
  }

  int16_t zero_point_of(int64_t row) const { return int16_t(rows.zero_points[rows.of(row)]); }

  // The windows of output pixels [first, first + count), inputs of `group`, each as [blocks][block_stride]: centred int16 or
  // the codes. What fills up a block is not written: its weights are 0.
  void gather(int64_t first, int64_t count, int64_t group, Code* out) const {
    int64_t sample = first / pixels, y = first % pixels / window.out_width, x = first % window.out_width;
    while (count > 0) {  // a line of the result at a time
      const int64_t run = std::min(count, window.out_width - x);
      const int16_t zero_point = rows.zero_points ? zero_point_of(first) : int16_t(0);
      const uint8_t* image = static_cast<const uint8_t*>(operands.x) +
                        sample * window.height * window.width * window.channels + group * per_group;
      const int64_t top = y * window.stride_height - window.padding_height;
      int64_t r = 0;
      while (r < run) {
        const int64_t left = (x + r) * window.stride_width - window.padding_width;
        const int64_t last = (window.width - window.kernel_width - left) / window.stride_width;  // with a window inside
        if (lines && left >= 0 && left + window.kernel_width <= window.width) {
          const int64_t inside = std::min(run - r, last + 1);
          gather_inside(image, top, left, inside, zero_point, out + r * stride);
          r += inside;
        } else {
          for (int64_t b = 0; b < blocks; ++b)
            gather_block(image, top, left, b, zero_point, out + r * stride + b * block_stride);
          ++r;
        }
      }
      out += run * stride, first += run, count -= run, x = 0;
      if (++y == window.out_height) y = 0, ++sample;
    }
  }

  // Windows of `count` pixels side by side, none of which leaves the image to the left or to the right.
  void gather_inside(const uint8_t* image, int64_t top, int64_t left, int64_t count, int16_t zero_point, Code* out) const {
    const int64_t line = window.kernel_width * per_group, step = window.stride_width * window.channels;
    for (int64_t i = 0; i < window.kernel_height; ++i, out += room_of(line)) {
      const int64_t y = top + i * window.dilation_height;
      const uint8_t* row = image + (y * window.width + left) * window.channels;
      if (y >= 0 && y < window.height)
        for (int64_t r = 0; r < count; ++r) copied(row + r * step, line, zero_point, out + r * stride);
      else
        for (int64_t r = 0; r < count; ++r) padded(line, zero_point, out + r * stride);
    }
  }

  void gather_block(const uint8_t* image, int64_t top, int64_t left, int64_t block, int16_t zero_point, Code* out) const {
    const int64_t first = block * window.block, count = std::min(window.block, per_group - first);
    const int64_t from = std::clamp<int64_t>(-left, 0, window.kernel_width);
    const int64_t to = std::clamp<int64_t>(window.width - left, from, window.kernel_width);
    Code* at = out;
    for (int64_t i = 0; i < window.kernel_height; ++i) {
      const int64_t y = top + i * window.dilation_height;
      const bool inside = y >= 0 && y < window.height;
      if (inside && lines) {  // a row of the kernel lies in one piece
        const uint8_t* row = image + (y * window.width + left + from) * window.channels;
        if (from) padded(from * count, zero_point, at);
        copied(row, (to - from) * count, zero_point, at + from * count);
        if (to < window.kernel_width) padded((window.kernel_width - to) * count, zero_point, at + to * count);
        at += room_of(window.kernel_width * count);
        continue;
      }
      Code* const line = at;
      for (int64_t j = 0; j < window.kernel_width; ++j, at += count) {
        const int64_t x = left + j * window.dilation_width;
        if (inside && x >= 0 && x < window.width)
          copied(image + (y * window.width + x) * window.channels + first, count, zero_point, at);
        else
          padded(count, zero_point, at);
      }
      if (lines) at = line + room_of(window.kernel_width * count);
    }
  }

  // Rows [first, first + count) for the products with a group's weight: where they lie, or gathered; none without memory.
  RowsAt rows_at(int64_t first, int64_t count, int64_t group, Scratch& gathered) const {
    if (reads_in_place(first, count)) {
      const uint8_t* x = static_cast<const uint8_t*>(operands.x) + first * window.channels + group * per_group;
      return {reinterpret_cast<const Code*>(x), window.channels, nullptr};
    }
    Code* out = gathered.of<Code>(rounded_up(count, WHOLE) * stride);
    if (out) gather(first, count, group, out);
    return {out, stride, nullptr};
  }

  // Of the codes of `count` rows of a panel's block.
  void row_sums(const Code* a, int64_t stride, int64_t count, int64_t block, int32_t* sums) const {
    const int64_t depth = depth_of(block), segment = std::min(depth, weight.segment), room = room_of(segment);
    for (int64_t r = 0; r < count; ++r, a += stride) {
      int32_t sum = 0;
      const Code* at = a;
      for (int64_t k = 0; k < depth; k += segment, at += room) sum += sum_of(at, segment);
      sums[r] = sum;
    }
  }
};

int64_t packed_size(int64_t groups, int64_t outputs, int64_t depth, int64_t block_depth, int64_t segment) {
  int64_t size = 0;
  for (int64_t first = 0; first < depth; first += block_depth)
    size += packed_depth(std::min(block_depth, depth - first), segment) * rounded_up(outputs, TILE) * groups;
  return size;
}

void pack(const int8_t* weight, int64_t groups, int64_t outputs, int64_t depth, int64_t block_depth, int64_t segment,
          int8_t* packed, int32_t* totals) {
  const int64_t tiles = (outputs + TILE - 1) / TILE, all = groups * tiles * TILE;
  std::memset(packed, 0, packed_size(groups, outputs, depth, block_depth, segment));
  std::memset(totals, 0, (depth + block_depth - 1) / block_depth * all * sizeof(int32_t));
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t first = 0, block = 0; first < depth; first += block_depth, ++block) {
      const int64_t count = std::min(block_depth, depth - first), whole = packed_depth(count, segment);
      for (int64_t tile = 0; tile < tiles; ++tile, packed += whole * TILE)
        for (int64_t j = 0; j < std::min<int64_t>(TILE, outputs - tile * TILE); ++j) {
          const int8_t* from = weight + (group * outputs + tile * TILE + j) * depth + first;
          int32_t& total = totals[block * all + (group * tiles + tile) * TILE + j];
          for (int64_t k = 0; k < count; ++k) {
            const int64_t to = k / segment * room_of(segment) + k % segment;
            packed[to / PACKED * PACKED * TILE + j * PACKED + to % PACKED] = from[k];
            total += from[k];
          }
        }
    }
}

}  // namespace
