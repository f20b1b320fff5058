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
  for (; count > 64; count -= 64, x += 64, out += 64) _mm512_storeu_si512(out, _mm512_loadu_si512(x));
  const uint64_t there = count == 64 ? ~0ull : (1ull << count) - 1;
  _mm512_mask_storeu_epi8(out, there, _mm512_maskz_loadu_epi8(there, x));
#else
  std::memcpy(out, x, count);
#endif
}
inline void copied(const float* x, int64_t count, int16_t, float* out) { std::memcpy(out, x, count * sizeof(float)); }

// And where the window leaves the image.
inline void padded(int64_t count, int16_t, int16_t* out) { std::memset(out, 0, count * sizeof(int16_t)); }
inline void padded(int64_t count, int16_t zero_point, uint8_t* out) { std::memset(out, zero_point, count); }
inline void padded(int64_t count, int16_t, float* out) { std::memset(out, 0, count * sizeof(float)); }

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
    stride = blocks * block_stride();
    pixels = v.out_height * v.out_width;
    total = o.samples * pixels;
    per_group = v.channels / w.groups;
    const bool pointwise = v.kernel_height * v.kernel_width == 1 && v.stride_height * v.stride_width == 1 &&
                           v.padding_height + v.padding_width == 0 && v.out_height == v.height && v.out_width == v.width;
    in_place = !CENTRED && pointwise && blocks == 1;
    lines = w.groups == 1 && blocks == 1 && v.dilation_width == 1;
  }

  int64_t block_stride() const { return rounded_up(weight.block_depth, GROUP); }
  // May the rows be read where they lie? A tile reads whole groups of products: the last pixels must not be the image's.
  bool reads_in_place(int64_t first, int64_t count) const {
    return in_place && (first + rounded_up(count, WHOLE)) * window.channels + rounded_up(per_group, GROUP) <= total * window.channels + per_group;
  }

  int64_t depth_of(int64_t block) const {
    return std::min(weight.block_depth, weight.depth - block * weight.block_depth);
  }

  // The bytes of the packed weight before a block's tile of a group.
  const int8_t* tile_of(int64_t group, int64_t block, int64_t tile) const {
    const int64_t full = tiles * rounded_up(weight.block_depth, GROUP) * TILE;
    const int64_t last = tiles * rounded_up(depth_of(blocks - 1), GROUP) * TILE;
    const int64_t of_group = (blocks - 1) * full + last;
    return weight.values + group * of_group + block * full + tile * rounded_up(depth_of(block), GROUP) * TILE;
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
  // codes from codes, or floats.
  template <class In, class Out>
  void gather(int64_t first, int64_t count, int64_t group, Out* out) const {
    int64_t sample = first / pixels, y = first % pixels / window.out_width, x = first % window.out_width;
    for (int64_t r = 0; r < count; ++r, out += stride) {
      const int16_t zero_point = rows.zero_points ? zero_point_of(first + r) : int16_t(0);
      const In* image = static_cast<const In*>(operands.x) +
                        sample * window.height * window.width * window.channels + group * per_group;
      const int64_t top = y * window.stride_height - window.padding_height;
      const int64_t left = x * window.stride_width - window.padding_width;
      for (int64_t b = 0; b < blocks; ++b) gather_block(image, top, left, b, zero_point, out + b * block_stride());
      if (++x == window.out_width) x = 0, ++y;
      if (y == window.out_height) y = 0, ++sample;
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
        at += window.kernel_width * count;
        continue;
      }
      for (int64_t j = 0; j < window.kernel_width; ++j, at += count) {
        const int64_t x = left + j * window.dilation_width;
        if (inside && x >= 0 && x < window.width)
          copied(image + (y * window.width + x) * window.channels + first, count, zero_point, at);
        else
          padded(count, zero_point, at);
      }
    }
    for (Out* end = out + block_stride(); at < end; ++at) *at = 0;
  }
};

int64_t packed_size(int64_t groups, int64_t outputs, int64_t depth, int64_t block_depth) {
  int64_t size = 0;
  for (int64_t first = 0; first < depth; first += block_depth)
    size += rounded_up(std::min(block_depth, depth - first), GROUP) * rounded_up(outputs, TILE) * groups;
  return size;
}

void pack(const int8_t* weight, int64_t groups, int64_t outputs, int64_t depth, int64_t block_depth, int8_t* packed,
          int32_t* totals) {
  const int64_t tiles = (outputs + TILE - 1) / TILE, all = groups * tiles * TILE;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t first = 0, block = 0; first < depth; first += block_depth, ++block) {
      const int64_t count = std::min(block_depth, depth - first);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        int32_t* total = totals + block * all + (group * tiles + tile) * TILE;
        std::memset(total, 0, TILE * sizeof(int32_t));
        for (int64_t k = 0; k < rounded_up(count, GROUP); k += PACKED)
          for (int64_t j = 0; j < TILE; ++j)
            for (int64_t side = 0; side < PACKED; ++side) {
              const int64_t output = tile * TILE + j;
              const bool there = output < outputs && k + side < count;
              *packed = there ? weight[(group * outputs + output) * depth + first + k + side] : int8_t(0);
              total[j] += *packed++;
            }
      }
    }
}

// Rows [first, first + count) of the product, tiles [from, to) of each group.
void panel(const Product& p, int64_t first, int64_t count, int64_t from, int64_t to) {
  static thread_local Scratch gathered, summed, multiplied, totalled, placed;
  const TileRegisters registers;
  int64_t* places = placed.of<int64_t>(count);
  for (int64_t r = 0; r < count; ++r) places[r] = p.place_of(first + r);
  int32_t* row_sums = summed.of<int32_t>(count * p.blocks);
  int32_t* sums = multiplied.of<int32_t>(rounded_up(count, WHOLE) * WIDE * TILE);
  float* t = totalled.of<float>(count * WIDE * TILE);
  for (int64_t group = 0; group < p.weight.groups; ++group) {
    const Code* a;
    int64_t stride = p.stride;
    if (p.reads_in_place(first, count)) {
      a = reinterpret_cast<const Code*>(static_cast<const uint8_t*>(p.operands.x) + first * p.window.channels + group * p.per_group);
      stride = p.window.channels;
    } else {
      Code* rows = gathered.of<Code>(rounded_up(count, WHOLE) * p.stride);
      p.gather<uint8_t>(first, count, group, rows);
      a = rows;
    }
    if (p.weight.zero_points)
      for (int64_t b = 0; b < p.blocks; ++b)
        for (int64_t r = 0; r < count; ++r)
          row_sums[b * count + r] = sum_of(a + r * stride + b * p.block_stride(), p.depth_of(b));
    for (int64_t tile = from; tile < to; tile += WIDE) {
      const int wide = int(std::min<int64_t>(WIDE, to - tile));
      Finisher finisher(p.weight, p.finish, p.rows, p.operands, p.tiles, group, tile, wide, !CENTRED, places);
      if (p.blocks > 1) finisher.begin(count, t);
      for (int64_t b = 0; b < p.blocks; ++b) {
        const int64_t depth = rounded_up(p.depth_of(b), GROUP);
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

int64_t layer(const Weight& weight, const Finish& finish, const Window& window, const Rows& rows,
              const Operands& operands) {
  const Product p(weight, finish, window, rows, operands);
  const int64_t macs = p.total * weight.groups * weight.outputs * weight.depth;
  const int threads = threads_for(macs, WORTH_A_THREAD);
  const int64_t panels = (p.total + PANEL - 1) / PANEL;
  // Few rows: each thread takes some of the outputs of every panel.
  const int64_t bands = (p.tiles + WIDE - 1) / WIDE, parts = panels >= threads ? 1 : std::min<int64_t>(threads, bands);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
  for (int64_t index = 0; index < panels; ++index)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = index * PANEL, count = std::min<int64_t>(PANEL, p.total - first);
      panel(p, first, count, part * bands / parts * WIDE, std::min((part + 1) * bands / parts * WIDE, p.tiles));
    }
  return macs;
}

}  // namespace
