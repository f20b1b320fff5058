// Convolutions without gathering, on paths whose products take the codes as they are.

namespace {

#if defined(QB_VNNI)
// A copy of the image with its padding, in which the inputs of a kernel row lie side by side, and at the same distance
// from those of the row before for every output pixel.
//
// A tile register takes 16 output pixels at one distance from each other. Where lines of the copy run on into each other,
// what would be to the right of the result is multiplied too, and dropped. Where a kernel row is short, the copy holds the
// inputs of each output pixel apart, as many kernel rows as a tile register takes side by side.
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
    if (!p.lines && v.channels % GROUP != 0) return false;
    const bool whole_tiles = v.out_width % 16 == 0 || v.out_width > 24;
    return WHOLE == 1 || (v.stride_height == 1 && v.stride_width == 1) || (p.lines && whole_tiles);
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

  // Panels of output pixels, wherever they lie.
  void by_rows(const Work& work) const {
    const int64_t of_line = p.window.out_width, length = work.band.count * of_line;
    for (int64_t part = 0, parts = std::max<int64_t>(1, length / PANEL); part < parts; ++part) {
      const int64_t row = part * length / parts, count = (part + 1) * length / parts - row;
      int64_t places[2 * PANEL];
      for (int64_t r = 0, y = row / of_line, x = row % of_line; r < count; ++r) {
        places[r] = y * line + x * step;
        if (++x == of_line) x = 0, ++y;
      }
      const Run run{0, row / of_line, row % of_line, count};
      multiply_and_finish(work, count, {reinterpret_cast<const Code*>(work.image), 0, places}, nullptr, 1, &run);
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
      multiply_and_finish(work, here, {}, at, many, runs);
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

  // `count` rows, or `count` tiles of 16 of them from these pointers on.
  void multiply_and_finish(const Work& work, int64_t count, [[maybe_unused]] const RowsAt& rows,
                           [[maybe_unused]] const Code* const* at, int64_t many, const Run* runs) const {
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
      multiply_pieces(count, wide, at, step, pieces, p.tile_of(0, 0, tile), p.block_stride * TILE, false, sums);
#else
      multiply_pieces(count, wide, rows, pieces, p.tile_of(0, 0, tile), p.block_stride * TILE, sums);
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
  const bool shares = of_sample == 1 && p.tiles * p.block_stride * TILE > CACHED;
  const int64_t together = shares ? std::clamp<int64_t>(2 * CACHED / image.size(lines), 1, std::min<int64_t>(16, (samples + threads - 1) / threads)) : 1;
  const int64_t rounds = rounded_up((samples + together - 1) / together, threads);  // as much for each thread
  const int64_t works = shares ? std::min(samples, rounds) : samples * of_sample;
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

}  // namespace
