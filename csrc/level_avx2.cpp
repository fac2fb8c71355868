#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include "levels.h"
#define MERIT_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace level_avx2 {
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
