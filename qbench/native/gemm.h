// Convolutions and linear layers as products of a matrix of windows and a packed weight, finished tile by tile.
//
// A panel of rows (output pixels) is gathered from the image, unless the rows lie one after another in it already, and
// stays in the second-level cache while the tiles of the weight go by.

namespace {

inline int32_t sum_of(const Code* a, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i];
  return sum;
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

// What a panel holds: `count` codes as int16 less their zero point, or as they are, or floats as they are.
inline void copied(const uint8_t* x, int64_t count, int16_t zero_point, int16_t* out) {
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
inline void copied(const float* x, int64_t count, int16_t, float* out) { std::memcpy(out, x, count * sizeof(float)); }

// And where the window leaves the image.
inline void padded(int64_t count, int16_t, int16_t* out) { std::memset(out, 0, count * sizeof(int16_t)); }
inline void padded(int64_t count, int16_t zero_point, uint8_t* out) { std::memset(out, zero_point, count); }
inline void padded(int64_t count, int16_t, float* out) { std::memset(out, 0, count * sizeof(float)); }

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
  bool in_place;  // a row of the panel is a pixel of the image
  bool lines;  // taps side by side are inputs side by side

  Product(const Weight& w, const Finish& f, const Window& v, const Rows& r, const Operands& o)
      : weight(w), finish(f), window(v), rows(r), operands(o) {
    blocks = (w.depth + w.block_depth - 1) / w.block_depth;
    tiles = (w.outputs + TILE - 1) / TILE;
    stride = rounded_up(blocks * block_stride() + OVERRUN, ALIGNED);
    pixels = v.out_height * v.out_width;
    total = o.samples * pixels;
    per_group = v.channels / w.groups;
    const bool pointwise = v.kernel_height * v.kernel_width == 1 && v.stride_height * v.stride_width == 1 &&
                           v.padding_height + v.padding_width == 0 && v.out_height == v.height && v.out_width == v.width;
    in_place = !CENTRED && pointwise && blocks == 1 && (WHOLE == 1 || v.channels % ALIGNED == 0);
    lines = w.segment == v.kernel_width * v.channels && w.groups == 1 && blocks == 1 && v.dilation_width == 1;
  }

  int64_t block_stride() const { return packed_depth(weight.block_depth, weight.segment); }
  // May the rows be read where they lie? A tile reads whole groups of products: the last pixels must not be the image's.
  bool reads_in_place(int64_t first, int64_t count) const {
    return in_place && (first + rounded_up(count, WHOLE)) * window.channels + rounded_up(per_group, GROUP) <= total * window.channels + per_group;
  }

  int64_t depth_of(int64_t block) const {
    return std::min(weight.block_depth, weight.depth - block * weight.block_depth);
  }

  // The bytes of the packed weight before a block's tile of a group.
  const int8_t* tile_of(int64_t group, int64_t block, int64_t tile) const {
    const int64_t full = tiles * packed_depth(weight.block_depth, weight.segment) * TILE;
    const int64_t last = tiles * packed_depth(depth_of(blocks - 1), weight.segment) * TILE;
    const int64_t of_group = (blocks - 1) * full + last;
    return weight.values + group * of_group + block * full + tile * packed_depth(depth_of(block), weight.segment) * TILE;
  }

  // Where the outputs of a row begin in the result.
  int64_t place_of(int64_t row) const {
    const int64_t line = weight.groups * weight.outputs;
    if (!window.result_width) return row * line;
    const int64_t sample = row / pixels, pixel = row % pixels;
    const int64_t y = window.first_row + pixel / window.out_width * window.step_height;
    const int64_t x = window.first_column + pixel % window.out_width * window.step_width;
    return ((sample * window.result_height + y) * window.result_width + x) * line;
  }

  int16_t zero_point_of(int64_t row) const { return int16_t(rows.zero_points[rows.of(row)]); }

  // The windows of output pixels [first, first + count), inputs of `group`, each as [blocks][block_stride]: centred int16 or
  // codes from codes, or floats. What fills up a block is not written: its weights are 0.
  template <class In, class Out>
  void gather(int64_t first, int64_t count, int64_t group, Out* out) const {
    int64_t sample = first / pixels, y = first % pixels / window.out_width, x = first % window.out_width;
    while (count > 0) {  // a line of the result at a time
      const int64_t run = std::min(count, window.out_width - x);
      const int16_t zero_point = rows.zero_points ? zero_point_of(first) : int16_t(0);
      const In* image = static_cast<const In*>(operands.x) +
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
            gather_block(image, top, left, b, zero_point, out + r * stride + b * block_stride());
          ++r;
        }
      }
      out += run * stride, first += run, count -= run, x = 0;
      if (++y == window.out_height) y = 0, ++sample;
    }
  }

  // Windows of `count` pixels side by side, none of which leaves the image to the left or to the right.
  template <class In, class Out>
  void gather_inside(const In* image, int64_t top, int64_t left, int64_t count, int16_t zero_point, Out* out) const {
    const int64_t line = window.kernel_width * per_group, step = window.stride_width * window.channels;
    for (int64_t i = 0; i < window.kernel_height; ++i, out += room_of(line)) {
      const int64_t y = top + i * window.dilation_height;
      const In* row = image + (y * window.width + left) * window.channels;
      if (y >= 0 && y < window.height)
        for (int64_t r = 0; r < count; ++r) copied(row + r * step, line, zero_point, out + r * stride);
      else
        for (int64_t r = 0; r < count; ++r) padded(line, zero_point, out + r * stride);
    }
  }

  template <class In, class Out>
  void gather_block(const In* image, int64_t top, int64_t left, int64_t block, int16_t zero_point, Out* out) const {
    const int64_t first = block * window.block, count = std::min(window.block, per_group - first);
    const int64_t from = std::clamp<int64_t>(-left, 0, window.kernel_width);
    const int64_t to = std::clamp<int64_t>(window.width - left, from, window.kernel_width);
    Out* at = out;
    for (int64_t i = 0; i < window.kernel_height; ++i) {
      const int64_t y = top + i * window.dilation_height;
      const bool inside = y >= 0 && y < window.height;
      if (inside && lines) {  // a row of the kernel lies in one piece
        const In* row = image + (y * window.width + left + from) * window.channels;
        if (from) padded(from * count, zero_point, at);
        copied(row, (to - from) * count, zero_point, at + from * count);
        if (to < window.kernel_width) padded((window.kernel_width - to) * count, zero_point, at + to * count);
        at += room_of(window.kernel_width * count);
        continue;
      }
      Out* const line = at;
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

  // Of the codes of one row of a panel's block.
  int32_t row_sum(const Code* a, int64_t block) const {
    const int64_t depth = depth_of(block), segment = std::min(depth, weight.segment);
    int32_t sum = 0;
    for (int64_t k = 0; k < depth; k += segment, a += room_of(segment)) sum += sum_of(a, segment);
    return sum;
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

// Rows [first, first + count) of the product, tiles [from, to) of each group.
void panel(const Product& p, int64_t first, int64_t count, int64_t from, int64_t to) {
  static thread_local Scratch gathered, summed, multiplied, totalled, placed;
  int64_t* places = placed.of<int64_t>(count);
  int32_t* row_sums = summed.of<int32_t>(count * p.blocks);
  int32_t* sums = multiplied.of<int32_t>(rounded_up(count, WHOLE) * WIDE * TILE);
  float* t = totalled.of<float>(count * WIDE * TILE);
  if (!places || !row_sums || !sums || !t) return;
  for (int64_t r = 0; r < count; ++r) places[r] = p.place_of(first + r);
  for (int64_t group = 0; group < p.weight.groups; ++group) {
    const Code* a;
    int64_t stride = p.stride;
    if (p.reads_in_place(first, count)) {
      a = reinterpret_cast<const Code*>(static_cast<const uint8_t*>(p.operands.x) + first * p.window.channels + group * p.per_group);
      stride = p.window.channels;
    } else {
      Code* rows = gathered.of<Code>(rounded_up(count, WHOLE) * p.stride);
      if (!rows) return;
      p.gather<uint8_t>(first, count, group, rows);
      a = rows;
    }
    if (p.weight.zero_points)
      for (int64_t b = 0; b < p.blocks; ++b)
        for (int64_t r = 0; r < count; ++r)
          row_sums[b * count + r] = p.row_sum(a + r * stride + b * p.block_stride(), b);
    for (int64_t tile = from; tile < to; tile += WIDE) {
      const int wide = int(std::min<int64_t>(WIDE, to - tile));
      Finisher finisher(p.weight, p.finish, p.rows, p.operands, p.tiles, group, tile, wide, !CENTRED, places);
      if (p.blocks > 1) finisher.begin(count, t);
      for (int64_t b = 0; b < p.blocks; ++b) {
        const int64_t depth = packed_depth(p.depth_of(b), p.weight.segment);
        multiply(count, wide, a + b * p.block_stride(), stride, p.tile_of(group, b, tile), depth * TILE, depth, sums);
        if (p.blocks == 1) {
          finisher.whole(first, count, sums, row_sums, t);
        } else {
          finisher.block(b, p.depth_of(b));
          finisher.add(first, count, sums, row_sums + b * count, t);
        }
      }
      if (p.blocks > 1) finisher.end(count, t);
    }
  }
}

#if defined(QB_VNNI)
// A convolution without gathering: a copy of the image with its padding, in which the inputs of a kernel row lie side by
// side, and at the same distance from those of the row before for every output pixel. A tile register takes 16 output
// pixels. Where lines of the copy run on into each other, what would be to the right of the result is multiplied too, and
// dropped. Where a kernel row is short, the copy holds the inputs of each output pixel apart, as many kernel rows as a
// tile register takes side by side.
struct PaddedImage {
  const Product& p;
  bool apart, run_on;
  int64_t top, left, extra_lines;
  int64_t width, step, line, depth;  // pixels of a line; bytes between pixels, between lines of the result, of a segment
  int64_t side, every;               // apart: kernel rows side by side, and input lines from one line of the copy to the next
  std::vector<int64_t> offsets;      // of the segments

  static bool fits(const Product& p) {
    const Window& v = p.window;
    if (p.weight.groups > 1 || p.blocks > 1 || v.kernel_height * v.kernel_width == 1) return false;
    if (is_apart(p)) return v.dilation_height == 1;
    const bool whole_tiles = WHOLE == 1 || v.out_width % 16 == 0 || v.out_width > 24;
    const bool stride_1 = v.stride_height == 1 && v.stride_width == 1;
    const int64_t reach = std::abs((v.kernel_width - 1) * v.dilation_width);
    if (WHOLE == 1 && stride_1 && reach * 8 > v.out_width) return false;  // too much of a line would be dropped
    return (p.lines || v.channels % GROUP == 0) && (stride_1 || (p.lines && whole_tiles));
  }

  static bool is_apart(const Product& p) { return WHOLE > 1 && p.lines && p.weight.segment * 2 <= GROUP; }

  explicit PaddedImage(const Product& product) : p(product), apart(is_apart(product)) {
    const Window& v = p.window;
    const int64_t down = (v.kernel_height - 1) * v.dilation_height, right = (v.kernel_width - 1) * v.dilation_width;
    top = std::min<int64_t>(0, down) - v.padding_height;
    left = std::min<int64_t>(0, right) - v.padding_width;
    extra_lines = std::abs(down);
    if (apart) {
      side = GROUP / room_of(p.weight.segment);
      every = 1;
      while (every < side && v.stride_height % (2 * every) == 0) every *= 2;
      width = v.out_width;
      step = depth = GROUP;
      line = v.stride_height / every * width * step;
      run_on = v.stride_height == every;
      for (int64_t i = 0; i < v.kernel_height; i += side) offsets.push_back(i / every * width * step);
      return;
    }
    side = every = 1;
    run_on = v.stride_height == 1 && v.stride_width == 1;
    width = (v.out_width - 1) * v.stride_width + 1 + std::abs(right);
    step = v.stride_width * v.channels;
    line = v.stride_height * width * v.channels;
    depth = p.lines ? room_of(p.weight.segment) : v.channels;
    for (int64_t i = 0; i < v.kernel_height; ++i)
      for (int64_t j = 0; j < (p.lines ? 1 : v.kernel_width); ++j)
        offsets.push_back(((i * v.dilation_height - v.padding_height - top) * width + j * v.dilation_width -
                           v.padding_width - left) * v.channels);
  }

  // Bytes of the copy for `count` lines of the result. A tile reads 16 rows and whole groups of products, whatever lies there.
  int64_t size(int64_t count) const {
    const int64_t of_line = apart ? width * step : width * p.window.channels;
    return lines_of(count) * of_line + 16 * step + depth + 64;
  }

  // Lines of the copy that `count` lines of the result meet.
  int64_t lines_of(int64_t count) const {
    const int64_t steps = (count - 1) * p.window.stride_height;
    return apart ? (steps + (p.window.kernel_height - 1) / side * side) / every + 1 : steps + 1 + extra_lines;
  }

  // A band of lines of a sample of the result.
  struct Band {
    int64_t sample, first, count;
  };

  // `many` bands. Tiles of the weight go by one group after another for all of them: a large weight is read once.
  void bands(const Band* band, int64_t many) const {
    static thread_local Scratch copied_scratch, summed;
    int64_t of_image = 0, of_sums = 0;
    for (int64_t i = 0; i < many; ++i) {
      of_image = std::max(of_image, rounded_up(size(band[i].count), 64));
      of_sums = std::max(of_sums, band[i].count * p.window.out_width);
    }
    uint8_t* images = copied_scratch.of<uint8_t>(many * of_image);
    int32_t* sums = p.weight.zero_points ? summed.of<int32_t>(many * of_sums) : nullptr;
    if (!images || (p.weight.zero_points && !sums)) return;
    for (int64_t i = 0; i < many; ++i) {
      uint8_t* image = images + i * of_image;
      const int64_t first = band[i].first * p.window.stride_height;
      if (apart)
        set_apart(band[i].sample, first, lines_of(band[i].count), image);
      else
        copy(band[i].sample, first, lines_of(band[i].count), image);
      if (sums) window_sums(image, band[i].count, sums + i * of_sums);
    }
    const int64_t some = many > 1 ? WIDE : p.tiles;
    for (int64_t tile = 0; tile < p.tiles; tile += some)
      for (int64_t i = 0; i < many; ++i) {
        const Work work{band[i], images + i * of_image, sums ? sums + i * of_sums : nullptr, tile,
                        std::min(tile + some, p.tiles)};
        if (WHOLE == 1)
          by_rows(work);
        else
          by_tiles(work);
      }
  }

  struct Work {  // a band, its copy, the sums of its windows (or null), and tiles [from, to) of the weight
    Band band;
    const uint8_t* image;
    const int32_t* row_sums;
    int64_t from, to;
  };

  struct Run {  // of rows of a panel: output pixels side by side
    int64_t row, y, x, count;
  };

  // Notes the runs of rows [row, row + count) of a copy whose lines run on.
  void note_runs(int64_t row, int64_t count, int64_t lines, int64_t place, Run* runs, int64_t& many) const {
    for (int64_t r = 0; r < count;) {
      const int64_t y = (row + r) / width, x = (row + r) % width, length = std::min(count - r, width - x);
      const int64_t kept = std::min(length, p.window.out_width - x);
      if (y < lines && kept > 0) runs[many++] = {place + r, y, x, kept};
      r += length;
    }
  }

  // Panels of rows at one distance from each other.
  void by_rows(const Work& work) const {
    const int64_t count = work.band.count;
    const int64_t of_line = p.window.out_width;
    const int64_t stretches = run_on ? 1 : count, length = run_on ? (count - 1) * width + of_line : of_line;
    for (int64_t s = 0; s < stretches; ++s)
      for (int64_t part = 0, parts = std::max<int64_t>(1, length / PANEL); part < parts; ++part) {
        Run runs[2 * PANEL];
        int64_t many = 0;
        const int64_t row = part * length / parts, here = (part + 1) * length / parts - row;
        if (run_on)
          note_runs(row, here, count, 0, runs, many);
        else
          runs[many++] = {0, s, row, here};
        const Code* at = reinterpret_cast<const Code*>(work.image) + s * line + row * step;
        multiply_and_finish(work, here, &at, many, runs);
      }
  }

  // Up to four tile registers of 16 rows.
  void by_tiles(const Work& work) const {
    constexpr int64_t ABREAST = 4;
    const int64_t count = work.band.count;
    const int64_t of_line = (p.window.out_width + 15) / 16;
    const int64_t all = run_on ? ((count - 1) * width + p.window.out_width + 15) / 16 : count * of_line;
    for (int64_t tile = 0; tile < all; tile += ABREAST) {
      Run runs[ABREAST * 16];
      const Code* at[ABREAST];
      int64_t many = 0;
      const int64_t here = std::min<int64_t>(ABREAST, all - tile);
      for (int64_t i = 0; i < here; ++i) {
        const int64_t y = (tile + i) / of_line, x = (tile + i) % of_line * 16, row = (tile + i) * 16;
        at[i] = reinterpret_cast<const Code*>(work.image) + (run_on ? row * step : y * line + x * step);
        if (run_on)
          note_runs(row, 16, count, i * 16, runs, many);
        else
          runs[many++] = {i * 16, y, x, std::min<int64_t>(16, p.window.out_width - x)};
      }
      multiply_and_finish(work, here, at, many, runs);
    }
  }

  // `count` lines of the copy: in each, `side` lines of the image from first + top on, a kernel row of each for each pixel.
  void set_apart(int64_t sample, int64_t first, int64_t count, uint8_t* out) const {
    const Window& v = p.window;
    const int16_t zero_point = p.zero_point_of(sample * p.pixels);
    const uint8_t* image = static_cast<const uint8_t*>(p.operands.x) + sample * v.height * v.width * v.channels;
    const int64_t room = GROUP / side, segment = p.weight.segment;
    for (int64_t i = 0; i < count; ++i, out += width * step)
      for (int64_t s = 0; s < side; ++s) {
        const int64_t y = first + top + i * every + s;
        uint8_t* at = out + s * room;
        for (int64_t x = 0; x < width; ++x, at += step) {
          const int64_t from = x * v.stride_width + left;
          if (y < 0 || y >= v.height)
            std::memset(at, zero_point, room);
          else if (from >= 0 && from + v.kernel_width <= v.width)
            copied(image + (y * v.width + from) * v.channels, segment, zero_point, at);
          else
            for (int64_t j = 0; j < segment; ++j) {
              const int64_t column = from + j / v.channels;
              const bool inside = column >= 0 && column < v.width;
              at[j] = inside ? image[(y * v.width + from) * v.channels + j] : uint8_t(zero_point);
            }
        }
      }
  }

  // `count` rows, or tiles of 16 of them, from these pointers on.
  void multiply_and_finish(const Work& work, int64_t count, const Code* const* at, int64_t many, const Run* runs) const {
    static thread_local Scratch multiplied, placed, totalled;
    int32_t* sums = multiplied.of<int32_t>(2 * PANEL * WIDE * TILE);
    float* t = totalled.of<float>(2 * PANEL * WIDE * TILE);
    int64_t* places = placed.of<int64_t>(2 * PANEL);
    if (!sums || !t || !places) return;
    const Window& v = p.window;
    const Pieces pieces{offsets.data(), int64_t(offsets.size()), depth};
    const int64_t first = work.band.sample * p.pixels + work.band.first * v.out_width;
    for (int64_t i = 0; i < many; ++i)
      for (int64_t r = 0; r < runs[i].count; ++r)
        places[runs[i].row + r] = p.place_of(first + runs[i].y * v.out_width + runs[i].x + r);
    for (int64_t tile = work.from; tile < work.to; tile += WIDE) {
      const int wide = int(std::min<int64_t>(WIDE, work.to - tile));
#if defined(QB_AMX)
      multiply_pieces(count, wide, at, step, pieces, p.tile_of(0, 0, tile), p.block_stride() * TILE, false, sums);
#else
      multiply_pieces(count, wide, *at, step, pieces, p.tile_of(0, 0, tile), p.block_stride() * TILE, sums);
#endif
      Finisher finisher(p.weight, p.finish, p.rows, p.operands, p.tiles, 0, tile, wide, true, places);
      for (int64_t i = 0; i < many; ++i) {
        const Run& run = runs[i];
        finisher.places = places + run.row;
        finisher.whole(first + run.y * v.out_width + run.x, run.count, sums + run.row * wide * TILE,
                       work.row_sums ? work.row_sums + run.y * v.out_width + run.x : nullptr, t);
      }
    }
  }

  void copy(int64_t sample, int64_t first, int64_t count, uint8_t* image) const {
    const Window& v = p.window;
    const int16_t zero_point = p.zero_point_of(sample * p.pixels);
    const int64_t from = std::clamp<int64_t>(-left, 0, width), to = std::clamp<int64_t>(v.width - left, from, width);
    for (int64_t i = 0; i < count; ++i, image += width * v.channels) {
      const int64_t y = first + top + i;
      if (y < 0 || y >= v.height) {
        padded(width * v.channels, zero_point, image);
        continue;
      }
      padded(from * v.channels, zero_point, image);
      copied(static_cast<const uint8_t*>(p.operands.x) + ((sample * v.height + y) * v.width + from + left) * v.channels,
             (to - from) * v.channels, zero_point, image + from * v.channels);
      padded((width - to) * v.channels, zero_point, image + to * v.channels);
    }
  }

  // The sum of the codes that each output pixel of `count` lines meets.
  void window_sums(const uint8_t* image, int64_t count, int32_t* sums) const {
    const Window& v = p.window;
    for (int64_t y = 0; y < count; ++y)
      for (int64_t x = 0; x < v.out_width; ++x) {
        const uint8_t* at = image + y * line + x * step;
        int32_t sum = 0;
        if (apart)
          for (int64_t i = 0; i < v.kernel_height; ++i)
            sum += sum_of(at + offsets[i / side] + i % side * (GROUP / side), p.weight.segment);
        else
          for (const int64_t offset : offsets) sum += sum_of(at + offset, p.lines ? p.weight.segment : v.channels);
        sums[y * v.out_width + x] = sum;
      }
  }
};

void padded_layer(const Product& p, int threads) try {
  const PaddedImage image(p);
  const int64_t lines = p.window.out_height, samples = p.operands.samples;
  constexpr int64_t CACHED = 1 << 18;  // bytes that leave room for others in the second-level cache
  // A sample in bands of lines whose copies stay there; few samples: at least one for each thread.
  const int64_t least = samples >= threads ? 1 : threads;
  const int64_t of_sample =
      std::min(lines, std::max(least, (lines * image.line + CACHED - 1) / CACHED));
  // Where the weight does not, whole samples share it.
  const bool shares = of_sample == 1 && p.tiles * p.block_stride() * TILE > CACHED;
  const int64_t together = shares ? std::clamp<int64_t>(2 * CACHED / image.size(lines), 1, std::min<int64_t>(16, (samples + threads - 1) / threads)) : 1;
  const int64_t works = shares ? (samples + together - 1) / together : samples * of_sample;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const TileRegisters registers;
#pragma omp for schedule(static)
    for (int64_t work = 0; work < works; ++work) {
      PaddedImage::Band bands[16];
      int64_t many = 0;
      if (shares) {
        for (int64_t sample = work * samples / works; sample < (work + 1) * samples / works; ++sample)
          bands[many++] = {sample, 0, lines};
      } else {
        const int64_t band = work % of_sample, first = band * lines / of_sample;
        bands[many++] = {work / of_sample, first, (band + 1) * lines / of_sample - first};
      }
      image.bands(bands, many);
    }
  }
} catch (const std::bad_alloc&) {  // of the offsets: no thread works yet
  ++shortages;
}
#endif

int64_t layer(const Weight& weight, const Finish& finish, const Window& window, const Rows& rows,
              const Operands& operands) {
  const Product p(weight, finish, window, rows, operands);
  const int64_t macs = p.total * weight.groups * weight.outputs * weight.depth;
  const int threads = threads_for(macs, WORTH_A_THREAD);
#if defined(QB_VNNI)
  if (PaddedImage::fits(p)) {
    padded_layer(p, threads);
    return macs;
  }
#endif
  const int64_t panels = std::max<int64_t>(p.total > 0, p.total / PANEL);  // of PANEL rows or somewhat more
  // Few rows: each thread takes some of the outputs of every panel.
  const int64_t bands = (p.tiles + WIDE - 1) / WIDE, parts = panels >= threads ? 1 : std::min<int64_t>(threads, bands);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const TileRegisters registers;
#pragma omp for schedule(static) collapse(2)
    for (int64_t index = 0; index < panels; ++index)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = index * p.total / panels, count = (index + 1) * p.total / panels - first;
        panel(p, first, count, part * bands / parts * WIDE, std::min((part + 1) * bands / parts * WIDE, p.tiles));
      }
  }
  return macs;
}

}  // namespace
