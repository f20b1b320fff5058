// x86-64 with AVX-512 and VNNI: four products of bytes at once (vpdpbusd), 64 of them an instruction.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define QB_AVX2
#define QB_VNNI
#define QB_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif

namespace qb {
namespace on_avx512_vnni {
#include "all_kernels.inc"
const Kernels table = QB_TABLE("avx512_vnni");
}
const Kernels avx512_vnni = on_avx512_vnni::table;
}  // namespace qb

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
