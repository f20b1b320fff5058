// exp, sigmoid, tanh and sums of float32 with the same bits everywhere (qbench/functions.py).

namespace {

// Of Floats or TwoFloats; the first, of values up to 88.
template <class V>
inline V exponential_below(V x) {
  x = at_least(x, -87.0f);
  const V shifted = x * 1.44269504f + ROUNDER;
  const V n = shifted - ROUNDER;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return ((p * (r * r) + r) + 1.0f) * as_floats((as_ints(shifted) - (ROUNDER_BITS - 127)) << 23);
}

template <class V>
inline V exponential(V x) { return exponential_below(at_most(x, 88.0f)); }

template <class V>
inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-1.0f * x)); }

template <class V>
inline V hyperbolic_tangent(V x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

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

// The sum of the lanes, which must lie within int32.
inline int32_t added_up(Ints lanes) {
#if defined(QB_AVX512)
  return _mm512_reduce_add_epi32(__m512i(lanes));
#else
  int32_t sum = 0;
  for (int j = 0; j < TILE; ++j) sum += lanes[j];
  return sum;
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
