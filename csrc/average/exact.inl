// Averages of bf16 by one weight that is a power of two: sums in fp32 where these are exact.

#ifdef MERIT_AVX512
// Terms of a sum whose sizes differ by at most 13 powers of two: 8 of them have an exact fp32 sum.
static const int kExactSpread = 13 * 128 - 127;  // in bits of bf16
static const int kExactLargest = 0x7d80;         // no sum of 8 overflows

// Writes the sums of 32 elements times a power of two, which changes no digit, if all of them are
// exact before they are rounded; else writes nothing and returns false. A register of 32 bf16 is
// two of fp32: the odd elements with zeros below them, and the even ones after a shift.
template <int K>
static inline bool exact_sums(const uint16_t* const* x, int64_t at, __m512 weight, uint16_t* y) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000u)), one = _mm512_set1_epi16(1);
  __m512 even = _mm512_setzero_ps(), odd = even;
  __m512i largest = _mm512_setzero_si512();
  __m512i least = _mm512_set1_epi16(-1);  // of the sizes other than 0, less 1
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) {
    const __m512i bits = _mm512_loadu_si512(x[k] + at);
    const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(bits, upper));
    largest = _mm512_max_epu16(largest, size);
    least = _mm512_min_epu16(least, _mm512_sub_epi16(size, one));
    even = k ? _mm512_add_ps(even, low) : low;
    odd = k ? _mm512_add_ps(odd, high) : high;
  }
  const __m512i spread = _mm512_subs_epu16(largest, least);
  const __mmask32 inexact =
      _mm512_cmpgt_epu16_mask(spread, _mm512_set1_epi16(short(kExactSpread))) |
      _mm512_cmpgt_epu16_mask(largest, _mm512_set1_epi16(short(kExactLargest)));
  if (inexact) return false;
  const __m512i half = _mm512_set1_epi32(0x7fff), last = _mm512_set1_epi32(1);
  __m512i rounded[2] = {_mm512_castps_si512(_mm512_mul_ps(even, weight)),
                        _mm512_castps_si512(_mm512_mul_ps(odd, weight))};
  for (__m512i& bits : rounded) {
    const __m512i to_even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), last);
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(to_even, half));
  }
  const __m512i low = _mm512_srli_epi32(rounded[0], 16);
  _mm512_storeu_si512(y + at, _mm512_or_si512(low, _mm512_and_si512(rounded[1], upper)));
  return true;
}

// The weighted average of whole groups of 32 elements; those that exact_sums refuses in fp64.
template <int K>
static int64_t average_groups(const void* const* inputs, double weight, int64_t n, uint16_t* y) {
  const uint16_t* x[K];
  for (int k = 0; k < K; k++) x[k] = static_cast<const uint16_t*>(inputs[k]);
  const __m512 narrow = _mm512_set1_ps(float(weight));
  double acc[32];
  int64_t nonfinite = 0;
  for (int64_t at = 0; at < n; at += 32) {
    if (exact_sums<K>(x, at, narrow, y)) continue;
    for (int k = 0; k < K; k++) accumulate(x[k], DType::BF16, at, weight, k == 0, acc, 32);
    nonfinite += store_sixteen(acc, y + at) != 0;
    nonfinite += store_sixteen(acc + 16, y + at + 16) != 0;
  }
  return nonfinite;
}

typedef int64_t (*AverageGroups)(const void* const*, double, int64_t, uint16_t*);

// The function for bf16 of one weight, a power of two from 2^-16 to 1; else null.
static AverageGroups average_groups_of(double weight, int count) {
  if (weight < 0x1p-16 || weight > 1.0) return nullptr;
  switch (count) {
    case 2: return average_groups<2>;
    case 3: return average_groups<3>;
    case 4: return average_groups<4>;
    case 5: return average_groups<5>;
    case 6: return average_groups<6>;
    case 7: return average_groups<7>;
    case 8: return average_groups<8>;
    default: return nullptr;
  }
}
#endif
