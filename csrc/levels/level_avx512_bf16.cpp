// Level "avx512_bf16": AVX-512 with dot products of bf16. Only the sketch, the layers and the bf16
// head have kernels of their own here.
#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "levels/levels.h"
#define MERIT_AVX512 1
#define MERIT_AVX512_BF16 1
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace level_avx512_bf16 {
#include "common/numbers.inl"
#include "common/splitmix64.inl"
#include "cross_entropy/logits.inl"
#include "cross_entropy/fresh_pages.inl"
#include "cross_entropy/head_products.inl"
#include "cross_entropy/head.inl"
#include "layers/layers.inl"
#include "sketch/sketch.inl"
}  // namespace level_avx512_bf16
#pragma GCC pop_options
#endif
