#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "levels.h"
#define MERIT_AVX512 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace level_avx512 {
#include "numbers.inl"
#include "average.inl"
#include "deltas.inl"
#include "sketch.inl"
#include "sketch_linear.inl"
#include "token_sums.inl"
#include "cross_entropy.inl"
#include "optimizer.inl"
#include "layers.inl"
}
#pragma GCC pop_options
#endif
