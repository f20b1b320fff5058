// Transposed convolutions: each input pixel times each tap is added where it belongs in the result.

namespace {

// `weight` has groups * taps groups, tap by tap within a group of channels, each [outputs][block, inputs of a block].
int64_t transposed(const Weight& weight, const Finish& finish, const Window& v, const Rows& rows, const Operands& o,
                   int64_t groups) {
  const int64_t taps = v.kernel_height * v.kernel_width, pixels = v.height * v.width;
  const int64_t out_pixels = v.out_height * v.out_width;
  // Gathering reads one pixel, whatever the kernel.
  const Window pointwise{v.height, v.width, v.channels, v.height, v.width, 1, 1, 1, 1, 0, 0, 1, 1, v.block};
  Weight plain = weight;  // zero points are taken off before sums are added up
  plain.groups = groups;
  plain.zero_points = nullptr;
  const Rows by_input{rows.zero_points, rows.scales, rows.pixels == INT64_MAX ? INT64_MAX : pixels};
  Product reading(plain, finish, pointwise, by_input, o);
  reading.per_group = v.channels / groups;
  Product writing(plain, finish, v, rows, o);
  const int64_t tiles = reading.tiles, all = groups * taps * tiles * TILE;
  const int64_t macs = o.samples * pixels * groups * taps * weight.outputs * weight.depth;
  const int threads = threads_for(macs, WORTH_A_THREAD);
  const int64_t parts = o.samples >= threads ? 1 : std::min<int64_t>(tiles, threads);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
  for (int64_t sample = 0; sample < o.samples; ++sample)
    for (int64_t part = 0; part < parts; ++part) {
      static thread_local Scratch gathered, summed, totalled;
      const int64_t from = part * tiles / parts, to = (part + 1) * tiles / parts;
      int16_t* a = gathered.of<int16_t>(ROWS * reading.stride);
      int32_t* sums = summed.of<int32_t>(out_pixels * TILE);
      float(*t)[TILE] = reinterpret_cast<float(*)[TILE]>(totalled.of<float>(out_pixels * TILE));
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t tile = from; tile < to; ++tile) {
          const TileFinisher finisher(writing, group, tile);
          const int64_t row = sample * out_pixels;
          for (int64_t r = 0; r < out_pixels; ++r) finisher.begin(row + r, 1, t + r);
          for (int64_t b = 0; b < reading.blocks; ++b) {
            std::memset(sums, 0, out_pixels * TILE * sizeof(int32_t));
            for (int64_t first = 0; first < pixels; first += ROWS) {
              const int height = int(std::min<int64_t>(ROWS, pixels - first));
              int32_t row_sums[ROWS];
              for (int r = 0; r < height; ++r) {
                reading.gather<uint8_t>(sample * pixels + first + r, group, a + r * reading.stride);
                const int16_t* at = a + r * reading.stride + b * reading.block_stride();
                row_sums[r] = 0;
                for (int64_t k = 0; k < reading.depth_of(b); ++k) row_sums[r] += at[k];
              }
              for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t which = group * taps + tap;
                alignas(32) int32_t products[ROWS * TILE];
                MULTIPLY[height](a + b * reading.block_stride(), reading.stride, reading.tile_of(which, b, tile),
                                 (reading.depth_of(b) + 1) / 2, products);
                const int32_t* zero =
                    weight.zero_points ? weight.zero_points + b * all + (which * tiles + tile) * TILE : nullptr;
                for (int r = 0; r < height; ++r) {
                  const int64_t pixel = first + r;
                  const int64_t y = pixel / v.width * v.stride_height + tap / v.kernel_width * v.dilation_height -
                                    v.padding_height;
                  const int64_t x = pixel % v.width * v.stride_width + tap % v.kernel_width * v.dilation_width -
                                    v.padding_width;
                  if (y < 0 || y >= v.out_height || x < 0 || x >= v.out_width) continue;
                  int32_t* to_sum = sums + (y * v.out_width + x) * TILE;
                  for (int j = 0; j < TILE; ++j) {
                    uint32_t product = uint32_t(products[r * TILE + j]);
                    if (zero) product -= uint32_t(zero[j]) * uint32_t(row_sums[r]);
                    to_sum[j] = int32_t(uint32_t(to_sum[j]) + product);
                  }
                }
              }
            }
            for (int64_t r = 0; r < out_pixels; ++r) finisher.block(row + r, 1, b, sums + r * TILE, nullptr, t + r);
          }
          for (int64_t r = 0; r < out_pixels; ++r) finisher.end(row + r, 1, t + r);
        }
    }
  return macs;
}

}  // namespace
