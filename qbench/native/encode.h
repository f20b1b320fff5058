// Codes of a result, element by element.

namespace {

// y[i] = R(value(i)). By value, as bytes that are written may alias whatever lies in memory: the loop is vectorized.
template <class Value>
inline void encode(Codes codes, int64_t first, int64_t end, uint8_t* __restrict y, Value value) {
  for (int64_t i = first; i < end; ++i) y[i] = codes.of(value(i));
}

}  // namespace
