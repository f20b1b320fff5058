// Products of a few rows of a panel and some tiles of a packed weight: what is different for each instruction set.
//
//   Code      what a panel holds: centred int16 (q_x - z_x), or the codes themselves
//   PACKED    products of one output that lie side by side in a packed weight
//   GROUP     the depth of a packed weight is filled up to a multiple of it
//   ROWS      rows multiplied at once
//   WIDE      tiles multiplied at once
//   multiply  sums[r][tile * TILE + j] (+)= row r times output j of each tile, over `depth` products; `add` keeps what is there
//
// Weights are int8, or int16 times rows of int16 (`W`): as sums wrap, both are exact where the whole sum is an int32.

namespace {

#if !defined(QB_VNNI)
using Code = int16_t;
constexpr int64_t PACKED = 2, GROUP = 2;
constexpr int ROWS = 6, WIDE = 1;  // 12 registers of sums on AVX2
#else
using Code = uint8_t;
constexpr int64_t PACKED = 4;
constexpr int ROWS = 6;
#if defined(QB_AMX)
constexpr int64_t GROUP = 64;  // a tile register has 16 rows of 64 bytes
constexpr int WIDE = 4;
#elif defined(QB_AVX512)
constexpr int64_t GROUP = 4;
constexpr int WIDE = 4;  // 24 registers of sums
#else
constexpr int64_t GROUP = 4;
constexpr int WIDE = 1;
#endif
#endif
constexpr bool CENTRED = sizeof(Code) == 2;
constexpr int64_t CHUNK = 1024;  // products a pass, at most: the tiles of the weight stay near
constexpr int64_t AHEAD = 2048;  // bytes of a weight asked for before it is their turn: they may come from afar

struct Pieces {  // of a row: from these offsets on, `depth` products each
  const int64_t* offsets;
  int64_t count, depth;
};

struct RowsAt {  // of a panel: at one distance from each other, or where `places` has them (on paths with VNNI)
  const Code* first;
  int64_t stride;
  const int64_t* places;  // from `first` on; null: r * stride

  const Code* row(int64_t r) const { return first + (places ? places[r] : r * stride); }
  RowsAt from(int64_t r) const { return places ? RowsAt{first, stride, places + r} : RowsAt{first + r * stride, stride, nullptr}; }
};

constexpr int64_t CODES_A_WORD = 2 / int64_t(sizeof(Code));  // rows of int16 are counted and pointed to as codes
template <class W>
constexpr int64_t BYTES_A_CODE = CENTRED ? int64_t(sizeof(W)) : 1;  // of a packed weight, for each code of a row

inline int64_t chunk_of(int64_t depth) {
  const int64_t chunks = (depth + CHUNK - 1) / CHUNK;
  return chunks < 2 ? depth : rounded_up((depth + chunks - 1) / chunks, GROUP);
}

#if !defined(QB_AVX2)
template <int R, int C, class W>
void multiply_rows(const RowsAt& rows, const Pieces& pieces, const int8_t* packed, int64_t, bool add,
                   int32_t* sums) {
  const W* w = reinterpret_cast<const W*>(packed);
  uint32_t c[R][TILE] = {};  // sums without the correction for zero points may wrap; with it they are exact
  if (add) std::memcpy(c, sums, sizeof c);
  for (int64_t p = 0; p < pieces.count; ++p) {
    const Code* a = rows.first + pieces.offsets[p];
    for (int64_t k = 0; k < pieces.depth; k += 2, w += 2 * TILE, a += 2)
#pragma GCC unroll 6  // g++ 12 makes vectors of the rows otherwise, and reads twice as many as there are
      for (int r = 0; r < R; ++r) {
        const int32_t first = a[r * rows.stride], second = a[r * rows.stride + 1];
        for (int j = 0; j < TILE; ++j) c[r][j] += uint32_t(first * w[2 * j]) + uint32_t(second * w[2 * j + 1]);
      }
  }
  std::memcpy(sums, c, sizeof c);
}
#elif !defined(QB_VNNI)
inline __m256i eight_pairs(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}
inline __m256i eight_pairs(const int16_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }

template <int R, int C, class W>
void multiply_rows(const RowsAt& rows, const Pieces& pieces, const int8_t* packed, int64_t, bool add,
                   int32_t* sums) {
  const W* w = reinterpret_cast<const W*>(packed);
  __m256i c[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n)
      c[r][n] = add ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + r * TILE + n * 8)) : _mm256_setzero_si256();
  for (int64_t p = 0; p < pieces.count; ++p) {
    const Code* a = rows.first + pieces.offsets[p];
    for (int64_t k = 0; k < pieces.depth; k += 2, w += 2 * TILE, a += 2) {
      const __m256i w0 = eight_pairs(w), w1 = eight_pairs(w + TILE);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * rows.stride, 4);
        const __m256i both = _mm256_set1_epi32(pair);
        c[r][0] = _mm256_add_epi32(c[r][0], _mm256_madd_epi16(both, w0));
        c[r][1] = _mm256_add_epi32(c[r][1], _mm256_madd_epi16(both, w1));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * TILE + n * 8), c[r][n]);
}
#else
#if defined(QB_AVX512)
using Sums = __m512i;
#define QB_VPDPBUSD "vpdpbusd %2, %1, %0"
#define QB_VPDPWSSD "vpdpwssd %2, %1, %0"
inline Sums zeros() { return _mm512_setzero_si512(); }
inline Sums load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Sums v) { _mm512_storeu_si512(p, v); }
inline Sums everywhere(int32_t v) { return _mm512_set1_epi32(v); }
#else
using Sums = __m256i;
#define QB_VPDPBUSD "%{vex%} vpdpbusd %2, %1, %0"
#define QB_VPDPWSSD "%{vex%} vpdpwssd %2, %1, %0"
inline Sums zeros() { return _mm256_setzero_si256(); }
inline Sums load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Sums v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Sums everywhere(int32_t v) { return _mm256_set1_epi32(v); }
#endif
constexpr int LANES_OF_SUMS = int(sizeof(Sums) / 4), REGISTERS = TILE / LANES_OF_SUMS;

// By hand: g++ 12 moves the sums of _mm512_dpbusd_epi32 to the stack and back.
template <class W = int8_t>
inline void add_products(Sums& sums, Sums codes, Sums weights) {
  if constexpr (sizeof(W) == 1)
    asm(QB_VPDPBUSD : "+v"(sums) : "v"(codes), "v"(weights));
  else
    asm(QB_VPDPWSSD : "+v"(sums) : "v"(codes), "v"(weights));
}

// Four codes from x + k on in all lanes. By hand, as a compiler would move a pointer for each row along, not one index.
inline Sums four_everywhere(const Code* x, int64_t k) {
  Sums v;
  asm("vpbroadcastd (%1,%2), %0" : "=v"(v) : "r"(x), "r"(k), "m"(*reinterpret_cast<const int32_t*>(x)));
  return v;
}

template <int R, int C, class W>
void multiply_rows(const RowsAt& rows, const Pieces& pieces, const int8_t* w, int64_t tile_stride, bool add,
                   int32_t* sums) {
  if constexpr (R == 1 && C > 1) {  // the weight goes by at the speed of the caches: as one stream
    for (int n = 0; n < C; ++n)
      multiply_rows<1, 1, W>(rows, pieces, w + n * tile_stride, tile_stride, add, sums + n * TILE);
    return;
  }
  constexpr int N = C * REGISTERS;
  // Sums apart from each other: a product takes 5 cycles.
  constexpr int TURNS = R * N >= 8 ? 1 : R * N >= 4 ? 2 : R * N >= 2 ? 4 : 8;
  Sums c[TURNS][R][N];
#pragma GCC unroll 8
  for (int u = 0; u < TURNS; ++u)
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        c[u][r][n] = add && u == 0 ? load(sums + r * C * TILE + n * LANES_OF_SUMS) : zeros();
  const Code* at[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) at[r] = rows.row(r);
  int64_t first;
  const auto step = [&](int64_t k, Sums(&to)[R][N]) __attribute__((always_inline)) {
    if constexpr (R == 1) __builtin_prefetch(w + k * TILE + AHEAD);
    Sums b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      b[n] = load(w + n / REGISTERS * tile_stride + k * TILE + n % REGISTERS * int(sizeof(Sums)));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Sums x = four_everywhere(at[r], first + k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) add_products<W>(to[r][n], x, b[n]);
    }
  };
  for (int64_t p = 0; p < pieces.count; ++p, w += pieces.depth * TILE) {
    first = pieces.offsets[p];
    int64_t k = 0;
    for (; k + 4 * TURNS <= pieces.depth; k += 4 * TURNS)
#pragma GCC unroll 8
      for (int u = 0; u < TURNS; ++u) step(k + 4 * u, c[u]);
    for (; k < pieces.depth; k += 4) step(k, c[0]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Sums total = c[0][r][n];
#pragma GCC unroll 8
      for (int u = 1; u < TURNS; ++u)
#if defined(QB_AVX512)
        total = _mm512_add_epi32(total, c[u][r][n]);
#else
        total = _mm256_add_epi32(total, c[u][r][n]);
#endif
      store(sums + r * C * TILE + n * LANES_OF_SUMS, total);
    }
}
#endif

using MultiplyRows = void (*)(const RowsAt&, const Pieces&, const int8_t*, int64_t, bool, int32_t*);
#define QB_BY_ROWS(C) \
  {multiply_rows<1, C, W>, multiply_rows<2, C, W>, multiply_rows<3, C, W>, \
   multiply_rows<4, C, W>, multiply_rows<5, C, W>, multiply_rows<6, C, W>}
template <class W>
constexpr MultiplyRows MULTIPLY_ROWS[WIDE][ROWS] = {
    QB_BY_ROWS(1),
#if defined(QB_AVX512)
    QB_BY_ROWS(2), QB_BY_ROWS(3), QB_BY_ROWS(4),
#endif
};
#undef QB_BY_ROWS

// As `multiply`, of rows in pieces, in turns of about as many rows each.
template <class W = int8_t>
inline void multiply_by_rows(int64_t rows, int wide, const RowsAt& a, const Pieces& pieces, const int8_t* w,
                             int64_t tile_stride, bool add, int32_t* sums) {
  const int64_t turns = (rows + ROWS - 1) / ROWS, height = turns ? rows / turns : 0, longer = turns ? rows % turns : 0;
  for (int64_t turn = 0, r = 0; turn < turns; ++turn) {
    const int64_t count = height + (turn < longer);
    MULTIPLY_ROWS<W>[wide - 1][count - 1](a.from(r), pieces, w, tile_stride, add, sums + r * wide * TILE);
    r += count;
  }
}

#if defined(QB_AMX)
constexpr int64_t WHOLE = 16;  // rows of a tile register
constexpr int64_t WORTH_TILES = 3;

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfiguration ALL_WHOLE;  // in memory, as the intrinsic tells the compiler of eight of its bytes only

// The tile registers are configured for as long as it lives: all of them 16 rows of 64 bytes.
struct TileRegisters {
  TileRegisters() { _tile_loadconfig(&ALL_WHOLE); }
  ~TileRegisters() { _tile_release(); }
};

// R tile registers of sums, 16 rows each, times one tile of the weight.
template <int R>
void multiply_tiles(const Code* const* a, int64_t stride, const Pieces& pieces, const int8_t* w, bool add, int32_t* sums,
                    int64_t line) {
  const int64_t bytes = line * 4;
#define QB_EACH(run) \
  run(0, 4) if (R > 1) run(1, 5) if (R > 2) run(2, 7) if (R > 3) run(3, 4)
  if (add) {
#define QB_LOAD(r, unused) { _tile_loadd(r, sums + r * 16 * line, bytes); }
    QB_EACH(QB_LOAD)
  } else {
#define QB_ZERO(r, unused) { _tile_zero(r); }
    QB_EACH(QB_ZERO)
  }
  for (int64_t p = 0; p < pieces.count; ++p) {
    const int64_t first = pieces.offsets[p];
    for (int64_t k = first; k < first + pieces.depth; k += 64, w += 64 * TILE) {
      for (int i = 0; i < 16; ++i) __builtin_prefetch(w + AHEAD + i * 64);
      _tile_loadd(6, w, 64);
#define QB_MULTIPLY(r, input) { _tile_loadd(input, a[r] + k, stride); _tile_dpbusd(r, input, 6); }
      QB_EACH(QB_MULTIPLY)
    }
  }
#define QB_STORE(r, unused) { _tile_stored(r, sums + r * 16 * line, bytes); }
  QB_EACH(QB_STORE)
#undef QB_EACH
#undef QB_LOAD
#undef QB_ZERO
#undef QB_MULTIPLY
#undef QB_STORE
}

constexpr int TILES = 4;  // tile registers of sums

// As `multiply`: each of `count` (at most TILES) pointers is to 16 rows in pieces.
void multiply_pieces(int64_t count, int wide, const Code* const* a, int64_t stride, const Pieces& pieces, const int8_t* w,
                     int64_t tile_stride, bool add, int32_t* sums) {
  const auto run = count > 3 ? multiply_tiles<4> : count > 2 ? multiply_tiles<3> : count > 1 ? multiply_tiles<2>
                                                                                           : multiply_tiles<1>;
  for (int n = 0; n < wide; ++n)
    run(a, stride, pieces, w + n * tile_stride, add, sums + n * TILE, wide * TILE);
}
#else
constexpr int64_t WHOLE = 1;
struct TileRegisters {
  TileRegisters() {}
};

// As `multiply`, of rows in pieces: some pieces a pass, so that the tiles of the weight stay near.
inline void multiply_pieces(int64_t rows, int wide, const RowsAt& a, const Pieces& pieces, const int8_t* w,
                            int64_t tile_stride, int32_t* sums) {
  const int64_t some = std::max<int64_t>(1, CHUNK / pieces.depth);
  for (int64_t p = 0; p < pieces.count; p += some)
    multiply_by_rows(rows, wide, a, {pieces.offsets + p, std::min(some, pieces.count - p), pieces.depth},
                     w + p * pieces.depth * TILE, tile_stride, p > 0, sums);
}
#endif

// sums [rows][wide * TILE], any number of rows; `depth` is a multiple of GROUP or the rest of a weight's block. Rows of `a`
// are read, and sums written, up to a multiple of WHOLE. Within the life of a TileRegisters.
template <class W = int8_t>
inline void multiply(int64_t rows, int wide, const RowsAt& a, const int8_t* w, int64_t tile_stride, int64_t depth,
                     int32_t* sums) {
  if (!depth) std::memset(sums, 0, rows * wide * TILE * sizeof(int32_t));
#if defined(QB_AMX)
  if (sizeof(W) == 1 && rows >= WORTH_TILES) {
    const int64_t chunk = chunk_of(depth);
    for (int64_t r = 0; r < rows; r += 64)
      for (int64_t first = 0; first < depth; first += chunk) {
        const Pieces piece{&first, 1, std::min(chunk, depth - first)};
        const Code* const at[TILES] = {a.row(r), a.row(r + 16), a.row(r + 32), a.row(r + 48)};
        multiply_pieces((std::min<int64_t>(64, rows - r) + 15) / 16, wide, at, a.stride, piece, w + first * TILE, tile_stride,
                        first > 0, sums + r * wide * TILE);
      }
    return;
  }
#endif
  const int64_t chunk = chunk_of(depth);
  for (int64_t first = 0; first < depth; first += chunk)
    multiply_by_rows<W>(rows, wide, a, {&first, 1, std::min(chunk, depth - first)}, w + first * TILE * BYTES_A_CODE<W>,
                        tile_stride, first > 0, sums);
}

// `rounds` times as many products as fit into the registers of a tile, nothing read: returns how many, 0 for none.
int64_t peak(int64_t rounds) {
#if defined(QB_AMX)
  const TileRegisters registers;
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  return rounds * 4 * 16 * 16 * 64;
#elif defined(QB_AVX512)
  Sums a = everywhere(0x01010101), c0, c1, c2, c3, c4, c5, c6, c7, c8, c9;
  c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = c8 = c9 = zeros();
  for (int64_t round = 0; round < rounds; ++round)
    asm volatile(
        "vpdpbusd %10, %10, %0\n vpdpbusd %10, %10, %1\n vpdpbusd %10, %10, %2\n vpdpbusd %10, %10, %3\n"
        "vpdpbusd %10, %10, %4\n vpdpbusd %10, %10, %5\n vpdpbusd %10, %10, %6\n vpdpbusd %10, %10, %7\n"
        "vpdpbusd %10, %10, %8\n vpdpbusd %10, %10, %9\n"
        : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7), "+v"(c8), "+v"(c9)
        : "v"(a));
  return rounds * 10 * 64;
#elif defined(QB_VNNI)
  Sums a = everywhere(0x01010101), c0, c1, c2, c3, c4, c5, c6, c7, c8, c9;
  c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = c8 = c9 = zeros();
  for (int64_t round = 0; round < rounds; ++round)
    asm volatile(
        "%{vex%} vpdpbusd %10, %10, %0\n %{vex%} vpdpbusd %10, %10, %1\n %{vex%} vpdpbusd %10, %10, %2\n"
        "%{vex%} vpdpbusd %10, %10, %3\n %{vex%} vpdpbusd %10, %10, %4\n %{vex%} vpdpbusd %10, %10, %5\n"
        "%{vex%} vpdpbusd %10, %10, %6\n %{vex%} vpdpbusd %10, %10, %7\n %{vex%} vpdpbusd %10, %10, %8\n"
        "%{vex%} vpdpbusd %10, %10, %9\n"
        : "+x"(c0), "+x"(c1), "+x"(c2), "+x"(c3), "+x"(c4), "+x"(c5), "+x"(c6), "+x"(c7), "+x"(c8), "+x"(c9)
        : "x"(a));
  return rounds * 10 * 32;
#elif defined(QB_AVX2)
  __m256i a = _mm256_set1_epi16(3), c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, t0, t1;
  c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = c8 = c9 = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; ++round)  // by hand: a compiler would keep an array of sums in memory
    asm volatile(
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %0, %0\n vpaddd %11, %1, %1\n"
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %2, %2\n vpaddd %11, %3, %3\n"
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %4, %4\n vpaddd %11, %5, %5\n"
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %6, %6\n vpaddd %11, %7, %7\n"
        "vpmaddwd %12, %12, %10\n vpmaddwd %12, %12, %11\n vpaddd %10, %8, %8\n vpaddd %11, %9, %9\n"
        : "+x"(c0), "+x"(c1), "+x"(c2), "+x"(c3), "+x"(c4), "+x"(c5), "+x"(c6), "+x"(c7), "+x"(c8), "+x"(c9),
          "=&x"(t0), "=&x"(t1)
        : "x"(a));
  return rounds * 10 * 16;
#else
  (void)rounds;
  return 0;
#endif
}

}  // namespace
