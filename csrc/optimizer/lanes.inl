// 8-bit codes of moments in registers of 16, with the bits of codes.inl.

static inline __m512 bits_as_floats(__m512i x) { return _mm512_castsi512_ps(x); }
static inline __m512i floats_as_bits(__m512 x) { return _mm512_castps_si512(x); }

// The same bits as encode_scaled with fewer instructions: products with powers of two and squares
// of whole numbers are exact, so they may be fused.
template <bool Stochastic>
static inline __m128i first_codes(__m512 x, __m512 factor, __m512i draws) {
  const __m512i sign = _mm512_set1_epi32(int32_t(0x80000000u));
  const __m512 one = _mm512_set1_ps(1.f);
  const __m512 size = bits_as_floats(_mm512_andnot_si512(sign, floats_as_bits(x)));
  const __m512 scaled = _mm512_mul_ps(size, factor);
  const __m512 root = _mm512_min_ps(_mm512_sqrt_ps(scaled), _mm512_set1_ps(126.f));
  const __m512 low = _mm512_roundscale_ps(root, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __m512 gap = _mm512_fmadd_ps(low, _mm512_set1_ps(0x1p-15f), _mm512_set1_ps(0x1p-16f));
  const __m512 draw =
      Stochastic ? _mm512_cvtepi32_ps(_mm512_srli_epi32(draws, 16)) : _mm512_set1_ps(0x1p15f);
  const __m512 above = _mm512_fnmadd_ps(low, low, scaled);
  const __mmask16 up = _mm512_cmp_ps_mask(_mm512_mul_ps(draw, gap), above, _CMP_LT_OQ);
  const __m512i code = floats_as_bits(_mm512_mask_add_ps(low, up, low, one));
  const __m512i signed_code =
      _mm512_ternarylogic_epi32(code, floats_as_bits(x), sign, 0xf8);  // code | (x & sign)
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(bits_as_floats(signed_code)));
}

// ``root_factor`` is 1 / 256 of that of encode_scaled: a sixteenth of a code is an exact unit, and
// its fourth power is the draws'.
template <bool Stochastic>
static inline __m128i second_codes(__m512 x, __m512 root_of_x, __m512 factor, __m512 root_factor,
                                   __m512i draws) {
  const int whole_sixteenths = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC | 4 << 4;
  const __m512i one = _mm512_set1_epi32(1);
  const __m512 scaled = _mm512_mul_ps(x, factor);
  const __m512 root = _mm512_min_ps(_mm512_sqrt_ps(_mm512_mul_ps(root_of_x, root_factor)),
                                    _mm512_set1_ps(254.f / 16.f));
  const __m512 low = _mm512_roundscale_ps(root, whole_sixteenths);
  const __m512 high = _mm512_add_ps(low, _mm512_set1_ps(1.f / 16.f));
  const __m512 low_square = _mm512_mul_ps(low, low);
  const __m512 high_square = _mm512_mul_ps(high, high);
  const __m512 below = _mm512_mul_ps(low_square, low_square);
  const __m512 gap = _mm512_sub_ps(_mm512_mul_ps(high_square, high_square), below);
  const __m512 draw = Stochastic
                          ? _mm512_cvtepi32_ps(_mm512_and_si512(draws, _mm512_set1_epi32(0xffff)))
                          : _mm512_set1_ps(0x1p15f);
  const __m512 above = _mm512_fnmadd_ps(_mm512_set1_ps(0x1p16f), below, scaled);
  const __mmask16 up = _mm512_cmp_ps_mask(_mm512_mul_ps(draw, gap), above, _CMP_LT_OQ);
  // The sum's last bits count sixteenths.
  const __m512i wide = floats_as_bits(_mm512_add_ps(low, _mm512_set1_ps(0x1.8p19f)));
  const __m512i code =
      _mm512_and_si512(_mm512_mask_add_epi32(wide, up, wide, one), _mm512_set1_epi32(0xff));
  const __m512i least = _mm512_min_epu32(floats_as_bits(scaled), one);
  return _mm512_cvtepi32_epi8(_mm512_max_epu32(code, least));
}

// Returns how many moments of the block have their codes now.
template <bool Second, bool Stochastic, class Code>
static int encode_lanes(const float* x, const float* roots, float factor, float root_factor,
                        Code* codes, int n, const uint32_t* draws) {
  const __m512 factors = _mm512_set1_ps(factor);
  const __m512 root_factors = _mm512_set1_ps(root_factor * 0x1p-8f);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 values = _mm512_loadu_ps(x + i);
    const __m512i bits = Stochastic ? _mm512_loadu_si512(draws + i) : _mm512_setzero_si512();
    __m128i packed;
    if constexpr (Second)
      packed =
          second_codes<Stochastic>(values, _mm512_loadu_ps(roots + i), factors, root_factors, bits);
    else
      packed = first_codes<Stochastic>(values, factors, bits);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), packed);
  }
  return i;
}
