// TILE values at once, and codes of a result.

namespace {

// Compilers lower these to the registers that there are.
typedef float Floats __attribute__((vector_size(TILE * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(TILE * 4), aligned(4), may_alias));
typedef uint32_t Wrapping __attribute__((vector_size(TILE * 4), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(TILE), aligned(1), may_alias));

inline Floats& lanes_at(float* x) { return *reinterpret_cast<Floats*>(x); }
inline const Floats& lanes_at(const float* x) { return *reinterpret_cast<const Floats*>(x); }
inline const Ints& lanes_at(const int32_t* x) { return *reinterpret_cast<const Ints*>(x); }

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// v, or `bound` where v lies beyond it; NaN stays NaN.
inline Floats at_least(Floats v, float bound) {
#if defined(QB_AVX512)
  return Floats(_mm512_max_ps(_mm512_set1_ps(bound), __m512(v)));
#else
  return v < bound ? Floats{} + bound : v;
#endif
}
inline Floats at_most(Floats v, float bound) {
#if defined(QB_AVX512)
  return Floats(_mm512_min_ps(_mm512_set1_ps(bound), __m512(v)));
#else
  return v > bound ? Floats{} + bound : v;
#endif
}

// R without its zero point, TILE at once; see `rounded`.
inline Ints rounded_lanes(Floats v, float low, float high) {
#if defined(QB_AVX512)
  v = Floats(_mm512_max_ps(__m512(v), _mm512_set1_ps(low)));
#else
  v = v > low ? v : Floats{} + low;
#endif
  return __builtin_bit_cast(Ints, at_most(v, high) + ROUNDER) - ROUNDER_BITS;
}

// TILE values from x on; of the last `count` < TILE, the others are 0.
template <class Vector, class In>
inline Vector taken(const In* x, int64_t count) {
  Vector v = {};  // copied: a template forgets that a vector may lie anywhere
  if (count >= TILE)
    std::memcpy(&v, x, sizeof v);
  else
    std::memcpy(&v, x, count * sizeof(In));
  return v;
}

// TILE values to y on; of the last `count` < TILE these alone. By value: see `taken`, a reference would say aligned.
template <class Out, class Vector>
inline void put(Vector v, int64_t count, Out* y) {
  if (count >= TILE)
    std::memcpy(y, &v, sizeof v);
  else
    std::memcpy(y, &v, count * sizeof(Out));
}

// Codes less their zero point.
inline Floats centred_codes(const uint8_t* x, int64_t count, int32_t zero_point) {
  return to_floats(__builtin_convertvector(taken<Bytes>(x, count), Ints) - zero_point);
}

// y[i] = R(value): value(i, count) gives those of i on, `count` of them at least.
template <class Value>
inline void encode(Codes codes, int64_t first, int64_t end, uint8_t* y, const Value& value) {
  const auto bytes = [codes](Floats v) {
    return __builtin_convertvector(rounded_lanes(v, codes.low, codes.high) + codes.zero_point, Bytes);
  };
  int64_t i = first;
  for (; i + TILE <= end; i += TILE) *reinterpret_cast<Bytes*>(y + i) = bytes(value(i, int64_t(TILE)));
  if (i < end) put(bytes(value(i, end - i)), end - i, y + i);
}

}  // namespace
