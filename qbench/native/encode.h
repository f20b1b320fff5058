// Codes of a result.

namespace {

// R without its zero point, TILE at once: rounded half to even and clamped; NaN gives the lower bound. |bounds| < 2^22.
inline Ints rounded_lanes(Floats v, float low, float high) {
  return as_ints(at_most(above(v, low), high) + ROUNDER) - ROUNDER_BITS;
}

#if defined(QB_AVX512)
// The bytes of four tiles that two packings have joined, a tile after the other.
inline __m512i in_order(__m512i packed) {
  return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), packed);
}
#endif

// x / scale for `rounded_lanes` with codes as bounds; `inverse` is 1 / scale. A product with that lies within 1e-4 of the
// quotient where this is below 512, so it rounds to the same code unless it lies so near to a half, or is no number.
inline Floats quotient(Floats x, float scale, [[maybe_unused]] float inverse) {
#if defined(QB_AVX512)
  const Floats near = x * inverse, off = near - (near + ROUNDER - ROUNDER);
  const __mmask16 sure = _mm512_cmp_ps_mask(_mm512_abs_ps(__m512(off)), _mm512_set1_ps(0.5f - 1e-4f), _CMP_LT_OQ);
  if (__builtin_expect(sure == 0xFFFF, 1)) return near;
#endif
  return x / scale;
}

// TILE values from x on; of the last `count` < TILE, the others are 0. Half a tile is common, and no call.
template <class Vector, class In>
inline Vector taken(const In* x, int64_t count) {
  if (count >= TILE) return copied_from<Vector>(x);
  Vector v = {};
  if (count == TILE / 2)
    std::memcpy(&v, x, TILE / 2 * sizeof(In));
  else
    std::memcpy(&v, x, count * sizeof(In));
  return v;
}

// TILE values to y on; of the last `count` < TILE these alone.
template <class Out, class Vector>
inline void put(Vector v, int64_t count, Out* y) {
  if (count >= TILE)
    copy_to(y, v);
  else if (count == TILE / 2)
    std::memcpy(y, &v, TILE / 2 * sizeof(Out));
  else
    std::memcpy(y, &v, count * sizeof(Out));
}

// Codes less their zero point.
inline Floats centred_codes(const uint8_t* x, int64_t count, int32_t zero_point) {
  return to_floats(to_ints(taken<Bytes>(x, count)) - zero_point);
}

// y[i] = table[x[i]] in `rows` rows of `count` bytes, from at(row) on; y may be x.
#if defined(QB_AVX512)
template <class At>
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) void replace_64(int64_t rows, int64_t count, const uint8_t* table,
                                                                          const At& at) {
  const __m512i a = _mm512_loadu_si512(table), b = _mm512_loadu_si512(table + 64);
  const __m512i c = _mm512_loadu_si512(table + 128), d = _mm512_loadu_si512(table + 192);
  for (int64_t r = 0; r < rows; ++r) {
    const auto [x, y] = at(r);
    for (int64_t i = 0; i < count; i += 64) {
      const uint64_t there = count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1;
      const __m512i index = _mm512_maskz_loadu_epi8(there, x + i);
      const __m512i low = _mm512_permutex2var_epi8(a, index, b), high = _mm512_permutex2var_epi8(c, index, d);
      _mm512_mask_storeu_epi8(y + i, there, _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high));
    }
  }
}
#endif

template <class At>
inline void replace_rows(int64_t rows, int64_t count, const uint8_t* table, const At& at) {
#if defined(QB_AVX512)
  if (__builtin_cpu_supports("avx512vbmi")) return replace_64(rows, count, table, at);
#endif
  for (int64_t r = 0; r < rows; ++r) {
    const auto [x, y] = at(r);
    for (int64_t i = 0; i < count; ++i) y[i] = table[x[i]];
  }
}

struct FromTo {
  const uint8_t* x;
  uint8_t* y;
};

inline void replace(const uint8_t* x, int64_t count, const uint8_t* table, uint8_t* y) {
  replace_rows(1, count, table, [=](int64_t) { return FromTo{x, y}; });
}

// y[i] = R(value): value(i, count) gives those of i on, `count` of them at least.
template <class Value>
inline void encode(Codes codes, int64_t first, int64_t end, uint8_t* y, const Value& value) {
  const auto bytes = [codes](Floats v) {
    return to_bytes(rounded_lanes(v, codes.low, codes.high) + codes.zero_point);
  };
  int64_t i = first;
  for (; i + TILE <= end; i += TILE) put(bytes(value(i, int64_t(TILE))), TILE, y + i);
  if (i < end) put(bytes(value(i, end - i)), end - i, y + i);
}

}  // namespace
