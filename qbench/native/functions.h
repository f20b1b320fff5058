// exp, sigmoid, tanh and sums of float32 with the same bits everywhere (qbench/functions.py).

namespace {

constexpr int LANES = 16;

inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + ROUNDER;
  const float n = shifted - ROUNDER;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = float_of((bits_of(shifted) - ROUNDER_BITS + 127) << 23);
  return ((p * (r * r) + r) + 1.0f) * power;
}

// The same of TILE values at once.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  x = x > 88.0f ? Floats{} + 88.0f : x;
  const Floats shifted = x * 1.44269504f + ROUNDER;
  const Floats n = shifted - ROUNDER;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Ints power = (__builtin_bit_cast(Ints, shifted) - (ROUNDER_BITS - 127)) << 23;
  return ((p * (r * r) + r) + 1.0f) * __builtin_bit_cast(Floats, power);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

inline Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

// The lanes folded: j and j + 8, j + 4, j + 2, j + 1.
inline float folded(Floats lanes) {
  float values[LANES];
  std::memcpy(values, &lanes, sizeof values);
  for (int half = LANES / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) values[j] += values[j + half];
  return values[0];
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

// Element i goes to lane i mod 16, in order, then the lanes fold.
inline float lane_sum(const float* x, int64_t count) {
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int j = 0; j < LANES; ++j) lanes[j] += x[i + j];
  for (int j = 0; i + j < count; ++j) lanes[j] += x[i + j];
  for (int half = LANES / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return lanes[0];
}

}  // namespace
