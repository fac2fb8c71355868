// Level "avx512": AVX-512 F, BW, VL and DQ.
#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "levels/levels.h"
#define MERIT_AVX512 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace level_avx512 {
#include "levels/all_kernels.inl"
}
#pragma GCC pop_options
#endif
