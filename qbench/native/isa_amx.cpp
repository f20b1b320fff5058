// x86-64 with AMX: products of tiles of bytes (tdpbusd), 16,384 an instruction; few rows as on AVX-512.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define QB_AVX2
#define QB_VNNI
#define QB_AVX512
#define QB_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,prefer-vector-width=512")
#endif

namespace qb {
namespace on_amx {
#include "all_kernels.inc"
const Kernels table = QB_TABLE("amx");
}
const Kernels amx = on_amx::table;
}  // namespace qb

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
