// x86-64 with AVX2 and AVX-VNNI: four products of bytes at once (vpdpbusd), 32 of them an instruction.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define QB_AVX2
#define QB_VNNI
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace qb {
namespace on_avx_vnni {
#include "all_kernels.inc"
const Kernels table = QB_TABLE("avx_vnni");
}
const Kernels avx_vnni = on_avx_vnni::table;
}  // namespace qb

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
