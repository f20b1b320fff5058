// exp, sigmoid, tanh and sums of float32 with the same bits everywhere (qbench/functions.py).

namespace {

// Of TILE values at once; the first, of values up to 88.
inline Floats exponential_below(Floats x) {
  x = at_least(x, -87.0f);
  const Floats shifted = x * 1.44269504f + ROUNDER;
  const Floats n = shifted - ROUNDER;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Ints power = (as_ints(shifted) - (ROUNDER_BITS - 127)) << 23;
  return ((p * (r * r) + r) + 1.0f) * __builtin_bit_cast(Floats, power);
}

inline Floats exponential(Floats x) { return exponential_below(at_most(x, 88.0f)); }

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-1.0f * x)); }

inline Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

// The sum of the lanes: j and j + 8, j + 4, j + 2, j + 1.
inline float folded(Floats lanes) {
#if defined(QB_AVX512)
  return _mm512_reduce_add_ps(__m512(lanes));
#else
  float values[TILE];
  std::memcpy(values, &lanes, sizeof values);
  for (int half = TILE / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) values[j] += values[j + half];
  return values[0];
#endif
}

inline float largest_of(Floats lanes) {
#if defined(QB_AVX512)
  return _mm512_reduce_max_ps(__m512(lanes));
#else
  float largest = lanes[0];
  for (int j = 1; j < TILE; ++j) largest = std::max(largest, lanes[j]);
  return largest;
#endif
}

inline bool any_below_0(Ints v) {
#if defined(QB_AVX512)
  return _mm512_movepi32_mask(__m512i(v)) != 0;
#else
  int32_t signs = 0;
  for (int j = 0; j < TILE; ++j) signs |= v[j];
  return signs < 0;
#endif
}

}  // namespace
