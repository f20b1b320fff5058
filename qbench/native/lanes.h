// TILE values at once: Floats, Ints, Wrapping (uint32) and Bytes, in the registers that there are.
//
// A vector longer than a register is a pair of shorter ones, as g++ 12 takes comparisons and conversions of such vectors
// apart into single values.

namespace {

#define QB_VECTOR(Name, Scalar, bytes) typedef Scalar Name __attribute__((vector_size(bytes)))

#define QB_OPERATOR(Name, Scalar, op)                                                                            \
  friend inline Name operator op(Name a, Name b) { return {a.low op b.low, a.high op b.high}; }                  \
  friend inline Name operator op(Name a, Scalar b) { return {a.low op b, a.high op b}; }                         \
  friend inline Name operator op(Scalar a, Name b) { return {a op b.low, a op b.high}; }                         \
  inline Name& operator op##=(Name b) { return *this = *this op b; }                                             \
  inline Name& operator op##=(Scalar b) { return *this = *this op b; }

#define QB_PAIR(Name, Half, Scalar, ...)                                                                         \
  struct Name {                                                                       \
    Half low, high;                                                                                              \
    static constexpr int COUNT = int(2 * sizeof(Half) / sizeof(Scalar));                                         \
    inline Scalar operator[](int j) const { return j < COUNT / 2 ? low[j] : high[j - COUNT / 2]; }               \
    QB_OPERATOR(Name, Scalar, +) QB_OPERATOR(Name, Scalar, -) QB_OPERATOR(Name, Scalar, *) __VA_ARGS__           \
  };
#define QB_PAIRS(Prefix, HalfPrefix)                                                                                 \
  QB_PAIR(Prefix##Floats, HalfPrefix##Floats, float, QB_OPERATOR(Prefix##Floats, float, /))                         \
  QB_PAIR(Prefix##Ints, HalfPrefix##Ints, int32_t, QB_OPERATOR(Prefix##Ints, int32_t, &)                            \
          QB_OPERATOR(Prefix##Ints, int32_t, |) QB_OPERATOR(Prefix##Ints, int32_t, <<))                             \
  QB_PAIR(Prefix##Wrapping, HalfPrefix##Wrapping, uint32_t)                                                          \
  inline Prefix##Floats to_floats(Prefix##Ints v) { return {to_floats(v.low), to_floats(v.high)}; }                  \
  inline Prefix##Floats lower_of(Prefix##Floats v, Prefix##Floats w) {                                               \
    return {lower_of(v.low, w.low), lower_of(v.high, w.high)};                                                       \
  }                                                                                                                  \
  inline Prefix##Floats higher_of(Prefix##Floats v, Prefix##Floats w) {                                              \
    return {higher_of(v.low, w.low), higher_of(v.high, w.high)};                                                     \
  }                                                                                                                  \
  inline Prefix##Floats where_not(Prefix##Floats v, float that, Prefix##Floats w) {                                  \
    return {where_not(v.low, that, w.low), where_not(v.high, that, w.high)};                                         \
  }                                                                                                                  \
  inline Prefix##Floats less_exactly(Prefix##Floats v, Prefix##Floats w, float by) {                                 \
    return {less_exactly(v.low, w.low, by), less_exactly(v.high, w.high, by)};                                       \
  }

#define QB_REGISTERS(Prefix, bytes)                                                                                 \
  QB_VECTOR(Prefix##Floats, float, bytes);                                                                          \
  QB_VECTOR(Prefix##Ints, int32_t, bytes);                                                                          \
  QB_VECTOR(Prefix##Wrapping, uint32_t, bytes);                                                                     \
  inline Prefix##Floats to_floats(Prefix##Ints v) { return __builtin_convertvector(v, Prefix##Floats); }

// w where either is NaN; v - w * by, where the product has no more bits than a float: in one instruction, where there is one.
#define QB_PLAIN_CHOICES(Prefix)                                                                                    \
  inline Prefix##Floats lower_of(Prefix##Floats v, Prefix##Floats w) { return v < w ? v : w; }                      \
  inline Prefix##Floats higher_of(Prefix##Floats v, Prefix##Floats w) { return v > w ? v : w; }                     \
  inline Prefix##Floats where_not(Prefix##Floats v, float that, Prefix##Floats w) { return v == that ? Prefix##Floats{} : w; } \
  inline Prefix##Floats less_exactly(Prefix##Floats v, Prefix##Floats w, float by) { return v - w * by; }

QB_VECTOR(Bytes, uint8_t, 16);

#if defined(QB_AVX512)
QB_REGISTERS(, 64)
inline Floats lower_of(Floats v, Floats w) { return Floats(_mm512_min_ps(__m512(v), __m512(w))); }
inline Floats higher_of(Floats v, Floats w) { return Floats(_mm512_max_ps(__m512(v), __m512(w))); }
inline Floats where_not(Floats v, float that, Floats w) {
  return Floats(_mm512_maskz_mov_ps(_mm512_cmpneq_ps_mask(__m512(v), _mm512_set1_ps(that)), __m512(w)));
}
inline Floats less_exactly(Floats v, Floats w, float by) {
  return Floats(_mm512_fnmadd_ps(__m512(w), _mm512_set1_ps(by), __m512(v)));
}
inline Bytes to_bytes(Ints v) { return Bytes(_mm512_cvtepi32_epi8(__m512i(v))); }
inline Ints to_ints(Bytes v) { return Ints(_mm512_cvtepu8_epi32(__m128i(v))); }
#elif defined(QB_AVX2)
QB_REGISTERS(Half, 32)
inline HalfFloats lower_of(HalfFloats v, HalfFloats w) { return HalfFloats(_mm256_min_ps(__m256(v), __m256(w))); }
inline HalfFloats higher_of(HalfFloats v, HalfFloats w) { return HalfFloats(_mm256_max_ps(__m256(v), __m256(w))); }
inline HalfFloats where_not(HalfFloats v, float that, HalfFloats w) {
  return HalfFloats(_mm256_and_ps(_mm256_cmp_ps(__m256(v), _mm256_set1_ps(that), _CMP_NEQ_UQ), __m256(w)));
}
inline HalfFloats less_exactly(HalfFloats v, HalfFloats w, float by) {
  return HalfFloats(_mm256_fnmadd_ps(__m256(w), _mm256_set1_ps(by), __m256(v)));
}
QB_PAIRS(, Half)
inline Bytes to_bytes(Ints v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(__m256i(v.low), __m256i(v.high)), 0xD8);
  return Bytes(_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline Ints to_ints(Bytes v) {
  const __m128i bytes = __m128i(v);
  return {HalfInts(_mm256_cvtepu8_epi32(bytes)), HalfInts(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
#else
QB_REGISTERS(Quarter, 16)
QB_PLAIN_CHOICES(Quarter)
QB_PAIRS(Half, Quarter)
QB_PAIRS(, Half)
inline Bytes to_bytes(Ints v) {
  uint8_t bytes[TILE];
  for (int j = 0; j < TILE; ++j) bytes[j] = uint8_t(v[j]);
  return __builtin_bit_cast(Bytes, bytes);
}
inline Ints to_ints(Bytes v) {
  int32_t ints[TILE];
  for (int j = 0; j < TILE; ++j) ints[j] = v[j];
  return __builtin_bit_cast(Ints, ints);
}
#endif

// 2 and 4 * TILE values: chains of operations side by side, as one alone would wait for its own results; and how many of them
// the registers hold.
QB_PAIRS(Two, )
QB_PAIRS(Four, Two)
#if defined(QB_AVX512)
using ManyFloats = FourFloats;
#else
using ManyFloats = TwoFloats;
#endif
constexpr int64_t MANY = ManyFloats::COUNT;

// Made of tiles: of(i) is the ith; and taken apart: use(i, the ith).
template <class V>
constexpr int TILES_OF = int(sizeof(V) / sizeof(Floats));
template <class V, class Of>
inline V of_tiles(const Of& of, int first = 0) {
  if constexpr (std::is_same_v<V, Floats>) {
    return of(first);
  } else {
    using Half = decltype(V::low);
    return {of_tiles<Half>(of, first), of_tiles<Half>(of, first + TILES_OF<Half>)};
  }
}
template <class V, class Use>
inline void each_tile(V v, const Use& use, int first = 0) {
  if constexpr (std::is_same_v<V, Floats>)
    use(first, v);
  else
    each_tile(v.low, use, first), each_tile(v.high, use, first + TILES_OF<decltype(v.low)>);
}

inline Ints as_ints(Wrapping v) { return __builtin_bit_cast(Ints, v); }
inline Ints as_ints(Floats v) { return __builtin_bit_cast(Ints, v); }
inline TwoInts as_ints(TwoFloats v) { return {as_ints(v.low), as_ints(v.high)}; }
inline FourInts as_ints(FourFloats v) { return {as_ints(v.low), as_ints(v.high)}; }
inline Floats as_floats(Ints v) { return __builtin_bit_cast(Floats, v); }
inline TwoFloats as_floats(TwoInts v) { return {as_floats(v.low), as_floats(v.high)}; }
inline FourFloats as_floats(FourInts v) { return {as_floats(v.low), as_floats(v.high)}; }
inline Wrapping as_wrapping(Ints v) { return __builtin_bit_cast(Wrapping, v); }

// sum += v, one tile after the other.
inline void add_tiles(Floats& sum, Floats v) { sum += v; }
template <class Pair>
inline void add_tiles(Floats& sum, Pair v) { add_tiles(sum, v.low), add_tiles(sum, v.high); }

// v, or `bound` where v lies beyond it: NaN stays NaN; `above` makes the bound of it.
template <class V>
inline V at_least(V v, float bound) { return higher_of(V{} + bound, v); }
template <class V>
inline V at_most(V v, float bound) { return lower_of(V{} + bound, v); }
inline Floats above(Floats v, float bound) { return higher_of(v, Floats{} + bound); }

// Values from any address of their elements, and to one: a register at a time, as g++ 12 copies a pair through the stack.
template <class Vector>
inline Vector copied_from(const void* x) {
  if constexpr (std::is_class_v<Vector>) {
    using Half = decltype(Vector::low);
    return {copied_from<Half>(x), copied_from<Half>(static_cast<const char*>(x) + sizeof(Half))};
  } else {
    Vector v;
    std::memcpy(&v, x, sizeof v);
    return v;
  }
}
template <class Vector>
inline void copy_to(void* x, Vector v) {  // by value: a reference would say that the vector is aligned
  if constexpr (std::is_class_v<Vector>)
    copy_to(x, v.low), copy_to(static_cast<char*>(x) + sizeof v.low, v.high);
  else
    std::memcpy(x, &v, sizeof v);
}
inline Floats lanes_at(const float* x) { return copied_from<Floats>(x); }
inline Ints lanes_at(const int32_t* x) { return copied_from<Ints>(x); }
inline Wrapping wrapping_at(const void* x) { return copied_from<Wrapping>(x); }
inline void set_lanes(float* x, Floats v) { copy_to(x, v); }

}  // namespace
