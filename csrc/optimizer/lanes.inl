// Blocks of 8-bit moments and their bf16 weights in registers of 16, with the bits of codes.inl,
// moments.inl and update.inl.

static inline __m512 bits_as_floats(__m512i x) { return _mm512_castsi512_ps(x); }
static inline __m512i floats_as_bits(__m512 x) { return _mm512_castps_si512(x); }

static inline __m512 sixteen_of(const float* x) { return _mm512_loadu_ps(x); }
static inline __m512 sixteen_of(const uint16_t* x) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return bits_as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Decodes the moments of a whole block and updates them; the tops are their largest sizes.
template <class Grad>
static void update_moment_lanes(const Numbers& x, const Grad* grad, const CodedMoments& coded,
                                const BlockValues& out, float& first_top, float& second_top) {
  const __m512i sign = _mm512_set1_epi32(int32_t(0x80000000u));
  const __m512i near = _mm512_set1_epi32(int32_t(x.near));
  const __m512 m_unit = _mm512_set1_ps(first_unit(*coded.m_scale));
  const __m512 v_unit = _mm512_set1_ps(second_unit(*coded.v_scale));
  const __m512 clip = _mm512_set1_ps(x.clip), step = _mm512_set1_ps(x.step);
  const __m512 beta2 = _mm512_set1_ps(x.beta2), rest2 = _mm512_set1_ps(x.rest2);
  __m512i tops[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int i = 0; i < kMomentBlock; i += 16) {
    const __m128i m_codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(coded.m + i));
    const __m128i v_codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(coded.v + i));
    const __m512 m_root = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(m_codes)) * m_unit;
    const __m512 m = m_root * bits_as_floats(_mm512_andnot_si512(sign, floats_as_bits(m_root)));
    const __m512 v_code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v_codes));
    const __m512 v_root = v_code * v_code * v_unit;
    const __m512 v = v_root * v_root;
    const __m512 g = sixteen_of(grad + i) * clip;
    const __m512 from = bits_as_floats(_mm512_ternarylogic_epi32(
        near, floats_as_bits(m), floats_as_bits(g), 0xca));  // near ? m : g
    const __m512 first = from + step * (g - m);
    const __m512 second = v * beta2 + rest2 * g * g;
    tops[0] = _mm512_max_epu32(tops[0], _mm512_andnot_si512(sign, floats_as_bits(first)));
    tops[1] = _mm512_max_epu32(tops[1], floats_as_bits(second));  // no less than zero, or NaN
    _mm512_store_ps(out.m + i, first);
    _mm512_store_ps(out.roots + i, _mm512_sqrt_ps(second));
  }
  first_top = as_float(_mm512_reduce_max_epu32(tops[0]));
  second_top = as_float(_mm512_reduce_max_epu32(tops[1]) & 0x7fffffffu);
}

// A code's rounding, and its square less a quarter.
struct Shift {
  __m512 value, square;
};

static inline Shift shift_lanes(__m512i draws) {
  const __m512i kept = _mm512_set1_epi32(int32_t(0xffff0000u)), last = _mm512_set1_epi32(0x8000);
  const __m512i bits = _mm512_ternarylogic_epi32(draws, kept, last, 0xea);  // draws & kept | last
  const __m512 value = _mm512_cvtepi32_ps(bits) * _mm512_set1_ps(0x1p-32f);
  return {value, value * value - _mm512_set1_ps(0.25f)};
}

static inline Shift no_shift() { return {_mm512_setzero_ps(), _mm512_set1_ps(-0.25f)}; }

static inline __m512i first_lanes(__m512i bits, __m512 factor, const Shift& shift) {
  const __m512i sign = _mm512_set1_epi32(int32_t(0x80000000u));
  const __m512 scaled = bits_as_floats(_mm512_andnot_si512(sign, bits)) * factor;
  const __m512 root = _mm512_sqrt_ps(_mm512_max_ps(scaled + shift.square, _mm512_setzero_ps()));
  const __m512i code = floats_as_bits(root + shift.value);
  // code | (bits & sign)
  return _mm512_cvtps_epi32(bits_as_floats(_mm512_ternarylogic_epi32(code, bits, sign, 0xf8)));
}

static inline __m512i second_lanes(__m512 root, __m512 factor, const Shift& shift) {
  const __m512 square = root * factor + _mm512_set1_ps(3.f) * shift.square;
  const __m512 code = _mm512_sqrt_ps(_mm512_max_ps(square, _mm512_set1_ps(1.f))) + shift.value;
  const __mmask16 some = _mm512_cmp_ps_mask(root, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  return _mm512_maskz_cvtps_epi32(some, code);
}

// Codes of four registers of whole numbers in one, in order: at most 127 in size, or at most 255.
template <bool Second>
static inline __m512i packed_codes(const __m512i (&wide)[4]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32(wide[0], wide[1]);
  const __m512i high = _mm512_packs_epi32(wide[2], wide[3]);
  const __m512i packed =
      Second ? _mm512_packus_epi16(low, high)
             : _mm512_max_epi8(_mm512_packs_epi16(low, high), _mm512_set1_epi8(-127));
  return _mm512_permutexvar_epi32(order, packed);
}

// Codes of a whole block. ``shift_of(i)`` gives the rounding of 16 codes from i on.
template <class ShiftOf>
static inline void encode_lanes(const BlockValues& x, const Factors& factors,
                                const CodedMoments& to, const ShiftOf& shift_of) {
  const __m512 first_factors = _mm512_set1_ps(factors.first);
  const __m512 second_factors = _mm512_set1_ps(factors.second);
  for (int i = 0; i < kMomentBlock; i += 64) {
    __m512i first[4], second[4];
    for (int k = 0; k < 4; k++) {
      const int at = i + 16 * k;
      const Shift shift = shift_of(at);
      first[k] = first_lanes(_mm512_load_si512(x.m + at), first_factors, shift);
      second[k] = second_lanes(_mm512_load_ps(x.roots + at), second_factors, shift);
    }
    _mm512_storeu_si512(to.m + i, packed_codes<false>(first));
    _mm512_storeu_si512(to.v + i, packed_codes<true>(second));
  }
}

static inline void store_words(uint16_t* out, __m512i words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(words));
}

static inline __m512i with_random_lanes(__m512 value, __m512i random) {
  const __m512i bits = floats_as_bits(value);
  const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 below = _mm512_cmplt_epu32_mask(size, _mm512_set1_epi32(0x7f7f0000));
  return _mm512_mask_add_epi32(bits, below, bits, random);
}

// Bf16 weights, rounded with the high bits of random ones.
struct Bf16Lanes {
  uint16_t* weights;

  __m512 load(int i) const { return sixteen_of(weights + i); }
  void store(int i, __m512 value, __m512i drawn) const {
    const __m512i bits = with_random_lanes(value, _mm512_srli_epi32(drawn, 16));
    store_words(weights + i, _mm512_srli_epi32(bits, 16));
  }
};

// Bf16 weights with 8 more bits of their master, rounded in the same way.
struct Split8Lanes {
  uint16_t* weights;
  int8_t* low;

  __m512 load(int i) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i));
    const __m512i rest = _mm512_slli_epi32(_mm512_cvtepi8_epi32(bytes), 8);
    return bits_as_floats(_mm512_add_epi32(floats_as_bits(sixteen_of(weights + i)), rest));
  }
  void store(int i, __m512 value, __m512i drawn) const {
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i bits = _mm512_mask_mov_epi32(
        with_random_lanes(value, _mm512_srli_epi32(drawn, 24)), nan, _mm512_set1_epi32(0x7fc00000));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
    store_words(weights + i, _mm512_srli_epi32(nearest, 16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i),
                     _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8)));
  }
};

// Updates the weights of a block, which begins at element i of a run of random bits. Returns the
// random bits.
template <class Weights>
struct WeightLanes {
  Weights weights;
  BlockValues values;
  const uint32_t* places;
  __m512i key;
  __m512 decay, root, epsilon, rate;

  WeightLanes(const Numbers& x, const Weights& of, const BlockValues& moments,
              const RandomRun& random, int i)
      : weights(of),
        values(moments),
        places(random.places + i),
        key(_mm512_set1_epi32(int32_t(random.weight_key))),
        decay(_mm512_set1_ps(x.decay)),
        root(_mm512_set1_ps(x.root)),
        epsilon(_mm512_set1_ps(x.epsilon)),
        rate(_mm512_set1_ps(x.rate)) {}

  __m512i update(int i) const {
    const __m512i place = _mm512_xor_si512(_mm512_loadu_si512(places + i), key);
    const __m512i drawn = _mm512_mullo_epi32(place, _mm512_set1_epi32(int32_t(0x846ca68bu)));
    const __m512 size = _mm512_load_ps(values.roots + i) * root + epsilon;
    const __m512 moved = rate * (_mm512_load_ps(values.m + i) / size);
    weights.store(i, weights.load(i) * decay - moved, drawn);
    return drawn;
  }
};
