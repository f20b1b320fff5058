// Convolutions with one input channel for each output channel: no matrix product, channel by channel side by side.

namespace {

constexpr int CHANNELS = 16;  // channels whose sums stay in registers while the taps go by

// sums[c] += (x[c] - zero) * w[c]
inline void tap(const uint8_t* x, int32_t zero, const int16_t* w, int32_t* sums) {
#ifdef QB_AVX2
  const __m256i offset = _mm256_set1_epi16(int16_t(zero));
  const __m256i codes = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), offset);
  const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i low = _mm256_mullo_epi16(codes, weights), high = _mm256_mulhi_epi16(codes, weights);
  // Sums are kept in the order of the unpacks: 0-3 and 8-11, then 4-7 and 12-15.
  __m256i* s = reinterpret_cast<__m256i*>(sums);
  s[0] = _mm256_add_epi32(s[0], _mm256_unpacklo_epi16(low, high));
  s[1] = _mm256_add_epi32(s[1], _mm256_unpackhi_epi16(low, high));
#else
  for (int c = 0; c < CHANNELS; ++c) sums[c] += (int32_t(x[c]) - zero) * w[c];
#endif
}

inline void in_order(int32_t* sums) {
#ifdef QB_AVX2
  __m256i* s = reinterpret_cast<__m256i*>(sums);
  const __m256i a = s[0], b = s[1];
  s[0] = _mm256_permute2x128_si256(a, b, 0x20);
  s[1] = _mm256_permute2x128_si256(a, b, 0x31);
#else
  (void)sums;
#endif
}

int64_t depthwise(const int16_t* weight, const Finish& finish, const Window& v, const Rows& rows, const Operands& o) {
  const int64_t channels = v.channels, pixels = v.out_height * v.out_width, taps = v.kernel_height * v.kernel_width;
  const Weight shape{nullptr, nullptr, nullptr, 1, channels, taps, taps};  // all that a finisher asks about
  const int64_t lines = o.samples * v.out_height, tiles = (channels + TILE - 1) / TILE;
  const int threads = threads_for(o.samples * pixels * channels * taps, WORTH_A_THREAD);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t sample = line / v.out_height, top = line % v.out_height * v.stride_height - v.padding_height;
    const uint8_t* image = static_cast<const uint8_t*>(o.x) + sample * v.height * v.width * channels;
    const int32_t zero = rows.zero_points[line * v.out_width / rows.pixels];
    for (int64_t first = 0; first < channels; first += CHANNELS) {
      const int64_t count = std::min<int64_t>(CHANNELS, channels - first);
      int64_t place = line * v.out_width * channels;
      Finisher finisher(shape, finish, rows, o, tiles, 0, first / TILE, 1, false, &place);
      for (int64_t column = 0; column < v.out_width; ++column, place += channels) {
        const int64_t left = column * v.stride_width - v.padding_width;
        alignas(64) int32_t sums[CHANNELS] = {};
        for (int64_t i = 0; i < v.kernel_height; ++i) {
          const int64_t y = top + i * v.dilation_height;
          if (y < 0 || y >= v.height) continue;
          for (int64_t j = 0; j < v.kernel_width; ++j) {
            const int64_t x = left + j * v.dilation_width;
            if (x < 0 || x >= v.width) continue;
            const uint8_t* at = image + (y * v.width + x) * channels + first;
            const int16_t* w = weight + (i * v.kernel_width + j) * rounded_up(channels, CHANNELS) + first;
            if (count == CHANNELS) {
              tap(at, zero, w, sums);
            } else {
              uint8_t some[CHANNELS] = {};
              std::memcpy(some, at, count);
              tap(some, zero, w, sums);
            }
          }
        }
        in_order(sums);
        alignas(64) float t[TILE];
        finisher.whole(line * v.out_width + column, 1, sums, nullptr, t);
      }
    }
  }
  return o.samples * pixels * channels * taps;
}

}  // namespace
