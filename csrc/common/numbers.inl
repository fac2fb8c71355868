// Conversions of numbers and functions that vectorize, with the same bits on every level.

static inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

static inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

static inline double as_double(uint64_t bits) {
  double d;
  std::memcpy(&d, &bits, 8);
  return d;
}

static inline uint64_t as_wide(double d) {
  uint64_t bits;
  std::memcpy(&bits, &d, 8);
  return bits;
}

static inline uint16_t bits_to_bf16(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return uint16_t(nan ? 0x7fc0u : rounded);
}

// a * b + c, rounded once: an instruction, or on processors without it a function with its bits.
static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Rounds floats as bits_to_bf16 does. The processor's own instruction flushes subnormal numbers and
// keeps NaN's payload: vectors with one of these go the other way.
static inline void round_to_bf16(const float* __restrict values, uint16_t* __restrict out,
                                 int64_t count) {
  int64_t i = 0;
#if MERIT_AVX512_BF16
  for (; i + 32 <= count; i += 32) {
    const __m512 low = _mm512_loadu_ps(values + i);
    const __m512 high = _mm512_loadu_ps(values + i + 16);
    const int special = 0x01 | 0x20 | 0x80;  // quiet NaN, subnormal, signalling NaN
    if (__builtin_expect(
            _mm512_fpclass_ps_mask(low, special) | _mm512_fpclass_ps_mask(high, special), 0)) {
      for (int64_t j = i; j < i + 32; j++) out[j] = bits_to_bf16(as_bits(values[j]));
      continue;
    }
    _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
#endif
  for (; i < count; i++) out[i] = bits_to_bf16(as_bits(values[i]));
}

static inline float widen(uint16_t bf16) { return as_float(uint32_t(bf16) << 16); }

static inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);  // exact, denormals too
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their payload
  return as_float(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <class T>
static inline float value_of(T x) {
  if constexpr (sizeof(T) == 2)
    return widen(x);
  else
    return x;
}

// Returns a float as T: itself, or the nearest bf16.
template <class T>
static inline T rounded_to(float value) {
  if constexpr (sizeof(T) == 2)
    return bits_to_bf16(as_bits(value));
  else
    return value;
}

// e^x within 2 units in the last place (Cephes' polynomial); 0 below -86.9, infinity above 88.7,
// NaN for NaN.
static inline float exp_of(float x) {
  const float inside = x < -86.9f ? -86.9f : x > 88.7f ? 88.7f : x;  // NaN passes
  const float shifted = inside * 1.44269504f + 12582912.f;  // the last bits are the nearest integer
  const float n = shifted - 12582912.f;
  const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const uint32_t power = (as_bits(shifted) + 126u) << 23;  // 2^(n - 1), since 2^128 is no float
  const float value = p * as_float(power) * 2.f;
  return x < -86.9f ? 0.f : x > 88.7f ? as_float(0x7f800000u) : value;
}
