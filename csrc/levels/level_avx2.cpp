#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "levels/levels.h"
#define MERIT_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace level_avx2 {
#include "common/numbers.inl"
#include "average/average.inl"
#include "average/deltas.inl"
#include "sketch/sketch.inl"
#include "sketch/linear.inl"
#include "sketch/token_sums.inl"
#include "cross_entropy/cross_entropy.inl"
#include "optimizer/optimizer.inl"
#include "layers/layers.inl"
}  // namespace level_avx2
#pragma GCC pop_options
#endif
