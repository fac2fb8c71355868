// Level "avx2": AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "levels/levels.h"
#define MERIT_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace level_avx2 {
#include "levels/all_kernels.inl"
}
#pragma GCC pop_options
#endif
