// Layer norm of codes: mean and deviation from exact sums.

namespace {

void layer_norm(const uint8_t* x, int64_t rows, int64_t count, int32_t x_zero, double x_scale, double eps,
                const float* gamma, const float* beta, Codes codes, uint8_t* y) {
  const int threads = threads_for(rows * count, WORTH_A_THREAD_BYTES);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* at = x + row * count;
    int64_t sum = 0, squares = 0;
    for (int64_t first = 0; first < count; first += 1 << 14) {  // 255^2 * 2^14 < 2^31
      Ints some = {}, some_squares = {};
      const int64_t end = std::min<int64_t>(count, first + (1 << 14));
      for (int64_t i = first; i < end; i += TILE) {
        const Ints v = to_ints(taken<Bytes>(at + i, end - i));
        some += v;
        some_squares += v * v;
      }
      sum += added_up(some), squares += added_up(some_squares);
    }
    squares += x_zero * (x_zero * count - 2 * sum);  // of the codes less their zero point
    sum -= x_zero * count;
    const double mean = double(sum) / double(count), variance = double(squares) / double(count) - mean * mean;
    const float shift = float(mean), rstd = float(x_scale / std::sqrt(variance * (x_scale * x_scale) + eps));
    uint8_t* out = y + row * count;
    encode(codes, 0, count, out, [=](int64_t i, int64_t some) {
      const Floats normal = (centred_codes(at + i, some, x_zero) - shift) * rstd;
      return normal * taken<Floats>(gamma + i, some) + taken<Floats>(beta + i, some);
    });
  }
}

}  // namespace
