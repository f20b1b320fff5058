// Codes of a result.

namespace {

// R without its zero point, TILE at once: rounded half to even and clamped; NaN gives the lower bound. |bounds| < 2^22.
inline Ints rounded_lanes(Floats v, float low, float high) {
  return as_ints(at_most(above(v, low), high) + ROUNDER) - ROUNDER_BITS;
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
  return to_floats(to_ints(taken<Bytes>(x, count)) - zero_point);
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
