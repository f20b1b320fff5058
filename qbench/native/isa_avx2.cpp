// x86-64 with AVX2: products of int16 pairs (vpmaddwd), exact where vpmaddubsw would saturate.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define QB_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace qb {
namespace on_avx2 {
#include "all_kernels.inc"
const Kernels table = QB_TABLE("avx2");
}
const Kernels avx2 = on_avx2::table;
}  // namespace qb

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
