// Inputs as doubles, and doubles rounded once to a type. Loops are plain, so that the compiler
// vectorizes them at each level.

// Rounds to the nearest float, but ties and inexact results to the odd neighbour. A second rounding
// to a narrower type then equals one rounding of the double (Boldo & Melquiond 2008).
static inline uint32_t round_to_odd(double d) {
  const float f = float(d);
  const uint32_t bits = as_bits(f);
  const double back = double(f), size = d < 0 ? -d : d, back_size = back < 0 ? -back : back;
  const uint32_t toward_zero = bits - (back_size > size ? 1u : 0u);
  return back == d || d != d ? bits : toward_zero | 1u;
}

static inline uint16_t bits_to_half(uint32_t bits) {
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 halves are denormal: adding 0.5 aligns the float's last bit with the half's last
  // bit.
  const uint32_t denormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x477ff000u  ? overflow
                        : magnitude < 0x38800000u ? denormal
                                                  : normal;
  return uint16_t(half == 0x7e00u ? half : sign | half);
}

template <class T, class Value>
static inline void add_scaled(const T* __restrict x, const Value& value, double w, bool first,
                              double* acc, int64_t n) {
  if (first)
    for (int64_t i = 0; i < n; i++) acc[i] = w * double(value(x[i]));
  else
    for (int64_t i = 0; i < n; i++) acc[i] += w * double(value(x[i]));
}

// acc = w * x, or without `first` acc += w * x, for n elements from `at` on.
static void accumulate(const void* data, DType type, int64_t at, double w, bool first, double* acc,
                       int64_t n) {
  const uint16_t* half = static_cast<const uint16_t*>(data);
  switch (type) {
    case DType::BF16:
      return add_scaled(half + at, [](uint16_t x) { return widen(x); }, w, first, acc, n);
    case DType::F16:
      return add_scaled(half + at, [](uint16_t x) { return half_to_float(x); }, w, first, acc, n);
    case DType::F32:
      return add_scaled(
          static_cast<const float*>(data) + at, [](float x) { return x; }, w, first, acc, n);
    case DType::F64:
      return add_scaled(
          static_cast<const double*>(data) + at, [](double x) { return x; }, w, first, acc, n);
  }
}

#ifdef MERIT_AVX512
// Rounds eight doubles as round_to_odd: toward zero, and with the last bit set if that is inexact.
static inline __m256i eight_to_odd(const double* acc) {
  const __m512d d = _mm512_loadu_pd(acc);
  const __m256 f = _mm512_cvt_roundpd_ps(d, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __mmask8 inexact = _mm512_cmp_pd_mask(_mm512_cvtps_pd(f), d, _CMP_NEQ_OQ);
  const __m256i bits = _mm256_castps_si256(f);
  return _mm256_mask_or_epi32(bits, inexact, bits, _mm256_set1_epi32(1));
}

// Rounds 16 doubles to bf16 as bits_to_bf16 of round_to_odd. Returns which are not finite.
static inline __mmask16 store_sixteen(const double* acc, uint16_t* y) {
  const __m512i low = _mm512_castsi256_si512(eight_to_odd(acc));
  const __m512i bits = _mm512_inserti64x4(low, eight_to_odd(acc + 8), 1);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  const __m512i exponent = _mm512_set1_epi32(0x7f80);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtepi32_epi16(result));
  return _mm512_cmpeq_epi32_mask(_mm512_and_si512(result, exponent), exponent);
}
#endif

// Rounds m doubles to out[at..at+m); any NaN becomes the type's positive quiet NaN. Returns 0
// where all are finite.
static int64_t store(const double* acc, void* out, DType type, int64_t at, int64_t m) {
  int64_t nonfinite = 0;
  switch (type) {
    case DType::BF16: {
      uint16_t* __restrict y = static_cast<uint16_t*>(out) + at;
      int64_t i = 0;
#ifdef MERIT_AVX512
      for (; i + 16 <= m; i += 16) nonfinite += store_sixteen(acc + i, y + i) != 0;
#endif
      for (; i < m; i++) {
        y[i] = bits_to_bf16(round_to_odd(acc[i]));
        nonfinite += (y[i] & 0x7f80u) == 0x7f80u;
      }
      return nonfinite;
    }
    case DType::F16: {
      uint16_t* __restrict y = static_cast<uint16_t*>(out) + at;
      for (int64_t i = 0; i < m; i++) y[i] = bits_to_half(round_to_odd(acc[i]));
      for (int64_t i = 0; i < m; i++) nonfinite += (y[i] & 0x7c00u) == 0x7c00u;
      return nonfinite;
    }
    case DType::F32: {
      float* __restrict y = static_cast<float*>(out) + at;
      for (int64_t i = 0; i < m; i++)
        y[i] = acc[i] != acc[i] ? as_float(0x7fc00000u) : float(acc[i]);
      for (int64_t i = 0; i < m; i++) nonfinite += (as_bits(y[i]) & 0x7f800000u) == 0x7f800000u;
      return nonfinite;
    }
    case DType::F64: {
      double* __restrict y = static_cast<double*>(out) + at;
      for (int64_t i = 0; i < m; i++)
        y[i] = acc[i] != acc[i] ? double(as_float(0x7fc00000u)) : acc[i];
      for (int64_t i = 0; i < m; i++) nonfinite += !(y[i] - y[i] == 0.0);
      return nonfinite;
    }
  }
  return nonfinite;
}
