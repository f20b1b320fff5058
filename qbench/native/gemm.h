// Convolutions and linear layers: products finished tile by tile. A panel of rows stays in the second-level cache while the
// tiles of the weight go by.

namespace {

constexpr int64_t SHALLOW = 128;  // as often as the depth fits, a panel is taller: what a tile costs once is for more rows
constexpr int64_t TALLEST = WIDE > 1 ? 2 : 4;  // times as tall: its sums stay in the first-level cache
constexpr int64_t TURN = WHOLE > 1 ? WHOLE : ROWS;  // rows multiplied at once

// Rows [first, first + count) of the product, tiles [from, to) of each group, these from the last one on if `backwards`.
void panel(const Product& p, int64_t first, int64_t count, int64_t from, int64_t to, bool backwards) {
  static thread_local Scratch gathered, summed, multiplied, totalled, placed;
  int64_t* places = placed.of<int64_t>(count);
  int32_t* row_sums = summed.of<int32_t>(count * p.blocks);
  int32_t* sums = multiplied.of<int32_t>(rounded_up(count, WHOLE) * WIDE * TILE);
  float* t = totalled.of<float>(count * WIDE * TILE);
  if (!places || !row_sums || !sums || !t) return;
  for (int64_t r = 0; r < count; ++r) places[r] = p.place_of(first + r);
  for (int64_t group = 0; group < p.weight.groups; ++group) {
    const RowsAt a = p.rows_at(first, count, group, gathered);
    if (!a.first) return;
    if (p.weight.zero_points)
      for (int64_t b = 0; b < p.blocks; ++b) p.row_sums(a.first + b * p.block_stride, a.stride, count, b, row_sums + b * count);
    const int64_t bands = (to - from + WIDE - 1) / WIDE;
    for (int64_t band = 0; band < bands; ++band) {
      const int64_t tile = from + (backwards ? bands - 1 - band : band) * WIDE;
      const int wide = int(std::min<int64_t>(WIDE, to - tile));
      Finisher finisher(p.weight, p.finish, p.rows, p.operands, p.tiles, group, tile, wide, !CENTRED, places);
      if (p.blocks > 1) finisher.begin(count, t);
      for (int64_t b = 0; b < p.blocks; ++b) {
        const int64_t depth = p.packed_depth_of(b);
        multiply(count, wide, {a.first + b * p.block_stride, a.stride, nullptr}, p.tile_of(group, b, tile), depth * TILE, depth, sums);
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
  if (!p.total) return 0;
  const int64_t macs = p.total * weight.groups * weight.outputs * weight.depth;
  const int threads = threads_for(macs, WORTH_A_THREAD);
#if defined(QB_VNNI)
  if (PaddedImage::fits(p) && operands.samples * window.out_height >= threads) {  // a work is a line, at least
    padded_layer(p, threads);
    return macs;
  }
#endif
  const int64_t enough = p.total / (8 * threads * PANEL);  // taller panels must still be many, for the threads to share
  const int64_t taller = std::min(SHALLOW / std::max<int64_t>(weight.depth, 1), enough);
  const int64_t height = PANEL * std::clamp<int64_t>(taller, 1, TALLEST);
  const int64_t panels = std::max<int64_t>(1, p.total / height);  // of so many rows or somewhat more
  const auto begin = [&](int64_t index) { return index < panels ? index * p.total / panels / TURN * TURN : p.total; };
  // Few rows: each thread takes some of the outputs of every panel.
  const int64_t bands = (p.tiles + WIDE - 1) / WIDE, parts = panels >= threads ? 1 : std::min<int64_t>(threads, bands);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const TileRegisters registers;
#pragma omp for schedule(static) collapse(2)
    for (int64_t index = 0; index < panels; ++index)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = begin(index), from = part * bands / parts * WIDE, to = (part + 1) * bands / parts * WIDE;
        panel(p, first, begin(index + 1) - first, from, std::min(to, p.tiles), false);
      }
  }
  return macs;
}

}  // namespace
