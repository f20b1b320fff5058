// What stands between layers: codes made, joined, averaged, looked up. Loops that the compiler vectorizes.

namespace {

template <class F>
void in_parts(int64_t count, const F& run) {
  const int threads = threads_for(count, WORTH_A_THREAD_BYTES);
  if (threads == 1) return run(int64_t(0), count);
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
    run(count * part / parts, count * (part + 1) / parts);
  }
}

void quantize(const float* x, int64_t count, float scale, Codes codes, uint8_t* y) {
  in_parts(count, [=](int64_t i, int64_t end) {
    encode(codes, i, end, y, [=, inverse = 1.0f / scale](int64_t k, int64_t some) {
      return quotient(taken<Floats>(x + k, some), scale, inverse);
    });
  });
}

// Scale and zero point of a range that holds 0 (qbench/schemes.py).
void range_to_scale(double low, double high, bool affine, float& scale, int32_t& zero_point) {
  const double width = affine ? high - low : std::max(-low, high);
  double s = width > 0 ? width / (affine ? 255.0 : 127.0) : 1.0;
  s = std::min(std::max(s, 0x1p-60), 0x1p60);
  scale = float(s);
  zero_point = affine ? int32_t(std::min(std::max(std::nearbyint(-low / double(scale)), 0.0), 255.0)) : 128;
}

// Codes of a row by its own range; false, and nothing written, where a value is not finite.
bool quantize_row(const float* x, int64_t count, bool affine, uint8_t* y, float& row_scale, int32_t& zero_point) {
  Floats low = {}, high = {};
  Ints odd_ones = {};
  for (int64_t i = 0; i < count; i += TILE) {
    const Floats v = taken<Floats>(x + i, count - i);
    low = lower_of(v, low), high = higher_of(v, high);
    odd_ones |= as_ints(as_wrapping(as_ints(v) & 0x7F800000) + 0x00800000u);  // below 0 where the exponent is the highest
  }
  if (any_below_0(odd_ones)) return false;
  range_to_scale(-largest_of(-1.0f * low), largest_of(high), affine, row_scale, zero_point);
  const Codes codes(zero_point, affine ? 0 : 1, 255);
  encode(codes, 0, count, y, [=, scale = row_scale, inverse = 1.0f / row_scale](int64_t k, int64_t some) {
    return quotient(taken<Floats>(x + k, some), scale, inverse);
  });
  return true;
}

int32_t quantize_rows(const float* x, int64_t rows, int64_t count, bool affine, uint8_t* y, float* scales,
                      int32_t* zero_points) {
  int32_t odd = 0;
  const int threads = threads_for(rows * count, WORTH_A_THREAD_BYTES);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : odd) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row)
    odd |= !quantize_row(x + row * count, count, affine, y + row * count, scales[row], zero_points[row]);
  return odd;
}

void dequantize(const uint8_t* x, int64_t count, float scale, int32_t zero_point, float* y) {
  in_parts(count, [=](int64_t i, int64_t end) {
    for (; i < end; i += TILE) put(centred_codes(x + i, end - i, zero_point) * scale, end - i, y + i);
  });
}

void add(const uint8_t* a, const uint8_t* b, int64_t count, int32_t a_zero, float m_a, int32_t b_zero, float m_b,
         Codes codes, uint8_t* y) {
  in_parts(count, [=](int64_t i, int64_t end) {
    encode(codes, i, end, y, [=](int64_t k, int64_t some) {
      return centred_codes(a + k, some, a_zero) * m_a + centred_codes(b + k, some, b_zero) * m_b;
    });
  });
}

void mul(const uint8_t* a, const uint8_t* b, int64_t count, int32_t a_zero, int32_t b_zero, float m, Codes codes,
         uint8_t* y) {
  in_parts(count, [=](int64_t i, int64_t end) {
    encode(codes, i, end, y, [=](int64_t k, int64_t some) {  // products of integers below 2^24: exact
      return centred_codes(a + k, some, a_zero) * centred_codes(b + k, some, b_zero) * m;
    });
  });
}

void look_up(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* y) {
  in_parts(count, [=](int64_t i, int64_t end) { replace(x + i, end - i, table, y + i); });
}

typedef uint8_t Lines __attribute__((vector_size(64), aligned(1), may_alias));

// How many taps lie before `end`: the first of them at 0, each `dilation` from the last.
inline int64_t taps_before(int64_t end, int64_t dilation) {
  return end <= 0 ? 0 : dilation == 1 ? end : (end + dilation - 1) / dilation;
}

void max_pool(const uint8_t* x, const Window& v, int64_t samples, uint8_t* y) {
  const int64_t lines = samples * v.out_height;
  const int64_t most = std::min(v.kernel_height, v.height) * std::min(v.kernel_width, v.width);  // of taps
  const int threads = threads_for(lines * v.out_width * v.channels * most, WORTH_A_THREAD_BYTES);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t sample = line / v.out_height, top = line % v.out_height * v.stride_height - v.padding_height;
    for (int64_t column = 0; column < v.out_width; ++column) {
      const int64_t left = column * v.stride_width - v.padding_width;
      uint8_t* out = y + (line * v.out_width + column) * v.channels;
      const int64_t top_tap = taps_before(-top, v.dilation_height), left_tap = taps_before(-left, v.dilation_width);
      const int64_t bottom_tap = std::min(v.kernel_height, taps_before(v.height - top, v.dilation_height));
      const int64_t right_tap = std::min(v.kernel_width, taps_before(v.width - left, v.dilation_width));
      const auto largest = [&](int64_t first, int64_t count, auto most) {
        for (int64_t i = top_tap; i < bottom_tap; ++i)
          for (int64_t j = left_tap; j < right_tap; ++j) {
            const int64_t row = top + i * v.dilation_height, place = left + j * v.dilation_width;
            const uint8_t* at = x + ((sample * v.height + row) * v.width + place) * v.channels + first;
            auto codes = most;
            std::memcpy(&codes, at, count);
            most = codes > most ? codes : most;
          }
        std::memcpy(out + first, &most, count);
      };
      int64_t first = 0;
      for (; first + 64 <= v.channels; first += 64) largest(first, 64, Lines{});
      for (; first < v.channels; first += 16) largest(first, std::min<int64_t>(16, v.channels - first), Bytes{});
    }
  }
}

// R(sum over a window of (q - x_zero) * m of its place): the windows' ends along each axis lie inside the image.
void average(const uint8_t* x, const Averaging& a, int64_t samples, Codes codes, uint8_t* y) {
  const int64_t lines = samples * a.out_height;
  const int threads = threads_for(samples * a.height * a.width * a.channels, WORTH_A_THREAD_BYTES);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t sample = line / a.out_height, i = line % a.out_height;
    for (int64_t j = 0; j < a.out_width; ++j) {
      const int64_t pixels = (a.bottoms[i] - a.tops[i]) * (a.rights[j] - a.lefts[j]);
      const float m = a.multipliers[i * a.out_width + j];
      encode(codes, 0, a.channels, y + (line * a.out_width + j) * a.channels, [&](int64_t c, int64_t some) {
        int64_t sums[TILE];
        std::fill(sums, sums + TILE, -pixels * a.x_zero);
        for (int64_t row = a.tops[i]; row < a.bottoms[i]; ++row) {
          const uint8_t* at = x + ((sample * a.height + row) * a.width + a.lefts[j]) * a.channels + c;
          const int64_t width = a.rights[j] - a.lefts[j];
          for (int64_t first = 0; first < width; first += 1 << 20) {  // 255 * 2^20 < 2^31
            Ints part = {};
            for (int64_t k = first; k < std::min<int64_t>(width, first + (1 << 20)); ++k)
              part += to_ints(taken<Bytes>(at + k * a.channels, some));
            for (int t = 0; t < TILE; ++t) sums[t] += part[t];
          }
        }
        float values[TILE];
        for (int t = 0; t < TILE; ++t) values[t] = float(sums[t]);
        return lanes_at(values) * m;
      });
    }
  }
}

// A matrix of bytes [channels][count] as [count][channels]: an image of few channels, channels last.
void interleave(const uint8_t* x, int64_t channels, int64_t count, uint8_t* y) {
  int64_t i = 0;
#if defined(QB_AVX512)
  if (channels == 3) {
    const __m128i three = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    for (; i + 24 <= count; i += 16) {  // the last four bytes of a store belong to the next
      const auto at = [&](int64_t c) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + c * count + i)); };
      const __m128i a = at(0), b = at(1), c = at(2);
      const __m128i ab = _mm_unpacklo_epi8(a, b), AB = _mm_unpackhi_epi8(a, b);
      const __m128i cc = _mm_unpacklo_epi8(c, c), CC = _mm_unpackhi_epi8(c, c);
      const __m128i pixels[4] = {_mm_unpacklo_epi16(ab, cc), _mm_unpackhi_epi16(ab, cc), _mm_unpacklo_epi16(AB, CC),
                                 _mm_unpackhi_epi16(AB, CC)};
      for (int k = 0; k < 4; ++k)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + (i + 4 * k) * 3), _mm_shuffle_epi8(pixels[k], three));
    }
  }
#endif
  for (; i < count; ++i)
    for (int64_t c = 0; c < channels; ++c) y[i * channels + c] = x[c * count + i];
}

// R((q - x_zero) * gamma + beta) of each channel.
void channel_affine(const uint8_t* x, int64_t pixels, int64_t channels, int32_t x_zero, const float* gamma,
                    const float* beta, Codes codes, uint8_t* y) {
  in_parts(pixels, [=](int64_t pixel, int64_t end) {
    for (; pixel < end; ++pixel)
      encode(codes, 0, channels, y + pixel * channels, [=, at = x + pixel * channels](int64_t c, int64_t some) {
        return centred_codes(at + c, some, x_zero) * taken<Floats>(gamma + c, some) + taken<Floats>(beta + c, some);
      });
  });
}

}  // namespace
