#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "levels/levels.h"
#define MERIT_AVX512 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace level_avx512 {
#include "common/numbers.inl"
#include "average/average.inl"
#include "average/deltas.inl"
#include "sketch/sketch.inl"
#include "sketch/linear.inl"
#include "sketch/token_sums.inl"
#include "cross_entropy/cross_entropy.inl"
#include "optimizer/optimizer.inl"
#include "layers/layers.inl"
}  // namespace level_avx512
#pragma GCC pop_options
#endif
