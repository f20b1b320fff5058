// Float inputs times an int8 weight: each tile of the weight is read back as float32 when its turn comes.

namespace {

using MultiplyFloats = void (*)(const float* a, int64_t stride, const float* w, int64_t count, float* sums);

#ifdef QB_AVX2
template <int R>
void multiply_floats(const float* a, int64_t stride, const float* w, int64_t count, float* sums) {
  __m256 c[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    c[r][0] = _mm256_loadu_ps(sums + r * TILE);
    c[r][1] = _mm256_loadu_ps(sums + r * TILE + 8);
  }
  for (int64_t k = 0; k < count; ++k, w += TILE) {
    const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256 x = _mm256_set1_ps(a[r * stride + k]);
      c[r][0] = _mm256_fmadd_ps(x, w0, c[r][0]);
      c[r][1] = _mm256_fmadd_ps(x, w1, c[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    _mm256_storeu_ps(sums + r * TILE, c[r][0]);
    _mm256_storeu_ps(sums + r * TILE + 8, c[r][1]);
  }
}
#else
template <int R>
void multiply_floats(const float* a, int64_t stride, const float* w, int64_t count, float* sums) {
  for (int64_t k = 0; k < count; ++k, w += TILE)
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < TILE; ++j) sums[r * TILE + j] += a[r * stride + k] * w[j];
}
#endif

constexpr MultiplyFloats MULTIPLY_FLOATS[ROWS + 1] = {nullptr,
                                                      multiply_floats<1>,
                                                      multiply_floats<2>,
                                                      multiply_floats<3>,
                                                      multiply_floats<4>,
                                                      multiply_floats<5>,
                                                      multiply_floats<6>};

// One block of a packed tile as float32 [count][TILE]: (q - zero point) * scale.
inline void read_back(const int8_t* w, int64_t count, const float* scales, const int32_t* zero_points, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    const int8_t* at = w + k / PACKED * PACKED * TILE + k % PACKED;
    for (int j = 0; j < TILE; ++j) {
      const int32_t q = zero_points ? at[PACKED * j] - zero_points[j] : at[PACKED * j];
      out[k * TILE + j] = float(q) * scales[j];
    }
  }
}

int64_t weight_only(const Weight& weight, const float* scales, const Finish& finish, const Window& window,
                    const Operands& operands) {
  const Rows none{nullptr, nullptr, INT64_MAX};
  const Product p(weight, finish, window, none, operands);
  const int64_t macs = p.total * weight.groups * weight.outputs * weight.depth, all = weight.groups * p.tiles * TILE;
  const int threads = threads_for(macs, WORTH_A_THREAD);
  const int64_t panels = (p.total + PANEL - 1) / PANEL;
  const int64_t parts = panels >= threads ? 1 : std::min<int64_t>(threads, p.tiles);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) if (threads > 1)
  for (int64_t index = 0; index < panels; ++index)
    for (int64_t part = 0; part < parts; ++part) {
      static thread_local Scratch gathered, read;
      float* a = gathered.of<float>(PANEL * p.stride);
      float* w = read.of<float>(weight.block_depth * TILE);
      if (!a || !w) continue;
      const int64_t first = index * PANEL, count = std::min<int64_t>(PANEL, p.total - first);
      int64_t places[PANEL];
      for (int64_t r = 0; r < count; ++r) places[r] = p.place_of(first + r);
      for (int64_t group = 0; group < weight.groups; ++group) {
        p.gather<float>(first, count, group, a);
        for (int64_t tile = part * p.tiles / parts; tile < (part + 1) * p.tiles / parts; ++tile) {
          const Finisher finisher(p.weight, p.finish, p.rows, p.operands, p.tiles, group, tile, 1, false, places);
          alignas(64) float t[PANEL * TILE];
          finisher.begin(count, t);
          for (int64_t b = 0; b < p.blocks; ++b) {
            const int64_t of_block = b * all + finisher.offset;
            read_back(p.tile_of(group, b, tile), p.depth_of(b), scales + of_block,
                      weight.zero_points ? weight.zero_points + of_block : nullptr, w);
            for (int64_t r = 0; r < count; r += ROWS)
              MULTIPLY_FLOATS[std::min<int64_t>(ROWS, count - r)](a + r * p.stride + b * p.block_stride(), p.stride, w,
                                                                p.depth_of(b), t + r * TILE);
          }
          finisher.end(count, t);
        }
      }
    }
  return macs;
}

}  // namespace
