// exp, sigmoid, tanh and sums of float32 with the same bits everywhere (qbench/functions.py).

namespace {

// exp(x), or exp(-x) where SIGN is -1, of Floats, TwoFloats or FourFloats; the first, of values up to 88.
template <int SIGN = 1, class V>
inline V exponential_below(V x) {
  const auto plus = [](auto a, auto b) { return SIGN > 0 ? a + b : a - b; };
  x = SIGN > 0 ? at_least(x, -87.0f) : at_most(x, 87.0f);
  const V shifted = x * 1.44269504f + ROUNDER;
  const V n = shifted - ROUNDER;
  const V r = less_exactly(x, n, 0.693359375f) - n * -2.12194440e-4f;  // n has 8 bits, the factor 9
  V p = V{} + 1.9875691500e-4f;
  p = plus(1.3981999507e-3f, p * r);
  p = plus(8.3334519073e-3f, p * r);
  p = plus(4.1665795894e-2f, p * r);
  p = plus(1.6666665459e-1f, p * r);
  p = plus(5.0000001201e-1f, p * r);
  const auto bits = SIGN > 0 ? as_ints(shifted) - (ROUNDER_BITS - 127) : (ROUNDER_BITS + 127) - as_ints(shifted);
  return (plus(p * (r * r), r) + 1.0f) * as_floats(bits << 23);
}

template <class V>
inline V exponential(V x) { return exponential_below(at_most(x, 88.0f)); }

template <class V>
inline V sigmoid(V x) { return 1.0f / (1.0f + exponential_below<-1>(at_least(x, -88.0f))); }

template <class V>
inline V hyperbolic_tangent(V x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

// Of all lanes: the sum (of j and j + 8, then j + 4, j + 2, j + 1), the sum, which must lie within int32, the largest, and
// whether one is below 0.
#if defined(QB_AVX512)
inline float folded(Floats lanes) { return _mm512_reduce_add_ps(__m512(lanes)); }
inline int32_t added_up(Ints lanes) { return _mm512_reduce_add_epi32(__m512i(lanes)); }
inline float largest_of(Floats lanes) { return _mm512_reduce_max_ps(__m512(lanes)); }
inline bool any_below_0(Ints v) { return _mm512_movepi32_mask(__m512i(v)) != 0; }
#else
// run(a, b) of lanes j and j + 8, then j + 4, j + 2 and j + 1 of the results.
template <class Vector, class Run>
inline auto reduced(Vector v, const Run& run) {
#if defined(QB_AVX2)
  const __m256 eight = __m256(run(v.low, v.high));
  using Half = decltype(v.low);
  const __m256 four = __m256(run(Half(eight), Half(_mm256_permute2f128_ps(eight, eight, 0x11))));
  const __m256 two = __m256(run(Half(four), Half(_mm256_permute_ps(four, 0xEE))));
  return run(Half(two), Half(_mm256_movehdup_ps(two)))[0];
#else
  if constexpr (std::is_class_v<Vector>) {
    return reduced(run(v.low, v.high), run);
  } else {
    for (int half = int(sizeof v / sizeof v[0]) / 2; half; half /= 2) {
      Vector moved = v;
      for (int j = 0; j < half; ++j) moved[j] = v[j + half];
      v = run(v, moved);
    }
    return v[0];
  }
#endif
}

inline float folded(Floats lanes) {
  return reduced(lanes, [](auto a, auto b) { return a + b; });
}
inline int32_t added_up(Ints lanes) {
  return reduced(lanes, [](auto a, auto b) { return a + b; });
}
inline float largest_of(Floats lanes) {
  return reduced(lanes, [](auto a, auto b) { return higher_of(a, b); });
}
inline bool any_below_0(Ints lanes) {
  return reduced(lanes, [](auto a, auto b) { return a | b; }) < 0;
}
#endif

}  // namespace
