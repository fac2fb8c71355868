// Gated activations of bf16 in registers of 32, with the bits of gated.inl.

template <Activation kind, class T>
constexpr bool in_lanes = sizeof(T) == 2 && kind != Activation::GELU;

// Floats of 32 bf16: the first 16, then the others.
struct Wide {
  __m512 half[2];
};

static inline Wide wide_of(const uint16_t* x) {
  const __m512i halves = _mm512_loadu_si512(x);
  const __m512i order = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                         6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i later = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  const __mmask32 upper = 0xaaaaaaaau;
  return {{_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper, order, halves)),
           _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper, later, halves))}};
}

// Rounds and stores; floats that the processor's conversion would flush or change go the other way.
static inline void store_wide(const Wide& x, uint16_t* out) {
  const int special = 0x01 | 0x20 | 0x80;  // quiet NaN, subnormal, signalling NaN
  const __mmask16 low = _mm512_fpclass_ps_mask(x.half[0], special);
  const __mmask16 high = _mm512_fpclass_ps_mask(x.half[1], special);
  if (__builtin_expect(!_kortestz_mask16_u8(low, high), 0)) {
    alignas(64) float values[32];
    _mm512_store_ps(values, x.half[0]);
    _mm512_store_ps(values + 16, x.half[1]);
    for (int i = 0; i < 32; i++) out[i] = bits_to_bf16(as_bits(values[i]));
    return;
  }
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(x.half[1], x.half[0]));
}

// one_plus_power: the instruction's own powers reach from 0 to infinity.
static inline __m512 one_plus_power_lanes(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  const __m512 inside = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // NaN passes
  const __m512 n = _mm512_roundscale_ps(inside, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(inside, n);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(kPowerOfTwo[0]), r, _mm512_set1_ps(kPowerOfTwo[1]));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kPowerOfTwo[2]));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kPowerOfTwo[3]));
  p = _mm512_fmadd_ps(p, r, one);
  return _mm512_add_ps(_mm512_scalef_ps(p, n), one);
}

template <Activation kind>
static inline __m512 power_lanes(__m512 x) {
  if constexpr (kind == Activation::GELU_TANH)
    return x * (_mm512_set1_ps(-2.30220818f) - _mm512_set1_ps(0.102943240f) * (x * x));
  return x * _mm512_set1_ps(-1.44269504f);
}

// Returns how many of the row's elements, 32 at a time, are done.
template <Activation kind>
static inline int64_t gated_lanes(const uint16_t* __restrict gate, const uint16_t* __restrict up,
                                  uint16_t* __restrict out, int64_t cols) {
  int64_t c = 0;
  for (; c + 32 <= cols; c += 32) {
    Wide x = wide_of(gate + c);
    const Wide factor = wide_of(up + c);
    for (int i = 0; i < 2; i++) {
      const __m512 value = x.half[i] / one_plus_power_lanes(power_lanes<kind>(x.half[i]));
      x.half[i] = value * factor.half[i];
    }
    store_wide(x, out + c);
  }
  return c;
}

template <Activation kind>
static inline int64_t gated_backward_lanes(const uint16_t* __restrict dout,
                                           const uint16_t* __restrict gate,
                                           const uint16_t* __restrict up,
                                           uint16_t* __restrict dgate, uint16_t* __restrict dup,
                                           int64_t cols) {
  const __m512 one = _mm512_set1_ps(1.f);
  int64_t c = 0;
  for (; c + 32 <= cols; c += 32) {
    const Wide gradient = wide_of(dout + c);
    Wide to_gate = wide_of(gate + c);
    Wide to_up = wide_of(up + c);
    for (int i = 0; i < 2; i++) {
      const __m512 x = to_gate.half[i];
      const __m512 share = one / one_plus_power_lanes(power_lanes<kind>(x));
      const __m512 value = x * share;
      const __m512 rest = one - share;
      __m512 slope;
      if constexpr (kind == Activation::SILU)
        slope = _mm512_fmadd_ps(value, rest, share);
      else
        slope = _mm512_fmadd_ps(value * rest,
                                _mm512_set1_ps(1.59576912f) + _mm512_set1_ps(0.21406445f) * (x * x),
                                share);
      to_gate.half[i] = gradient.half[i] * to_up.half[i] * slope;
      to_up.half[i] = gradient.half[i] * value;
    }
    store_wide(to_gate, dgate + c);
    store_wide(to_up, dup + c);
  }
  return c;
}
