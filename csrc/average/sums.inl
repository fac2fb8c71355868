// Weighted averages in fp64, rounded once to the output type, and Gram matrices. Loops are plain,
// so that the compiler vectorizes them at each level.

static const int64_t kBlock = kAverageBlock;
static const int kMostCertain = 8;  // inputs

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

static const int64_t kGroup = 128;

// Rounds the fp32 sums of kGroup elements of bf16 inputs to bf16, and returns whether every fp64
// sum provably rounds to the same; only then is y valid. With size = sum|w x| the fp32 sum is off
// by at most (K + 3) 2^-24 size, which is safe if twice that does not reach the middle between two
// bf16. Sums by equal weights that are a power of two often hit that middle, but exactly: they have
// no error while size <= 2^15 min|w x|.
template <int K, bool power_of_two>
static bool certain_group(const uint16_t* const* inputs, const float* weights, int64_t at,
                          uint16_t* y) {
  const uint16_t* x[K];
  float w[K];
  for (int k = 0; k < K; k++) x[k] = inputs[k] + at, w[k] = weights[k];
  const float error = float(2 * (K + 4)) * 0x1p-24f;
  uint32_t doubtful = 0;
#pragma GCC ivdep
  for (int i = 0; i < kGroup; i++) {
    float sum = 0.0f, size = 0.0f;
    uint32_t least = 0xffffffffu;  // bits of the smallest nonzero term, less 1
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const float term = w[k] * as_float(uint32_t(x[k][i]) << 16);
      const uint32_t magnitude = as_bits(term) & 0x7fffffffu, nonzero = magnitude - 1u;
      sum = k ? sum + term : term;
      size = k ? size + as_float(magnitude) : as_float(magnitude);
      if (power_of_two) least = nonzero < least ? nonzero : least;
    }
    const uint32_t bits = as_bits(sum), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const float distance = as_float(as_bits(sum - as_float(rounded & 0xffff0000u)) & 0x7fffffffu);
    const float middle = as_float(bits & 0x7f800000u) * 0x1p-8f;  // half a bf16's last place
    const uint32_t far = distance + (size * error + 0x1p-110f) < middle;
    const float bound = as_float(least & 0x7fffffffu) * 0x1p15f;
    const uint32_t exact = (size <= bound) & (bound > 0x1p-75f) & (size < 0x1p100f);
    doubtful |= (power_of_two ? far | exact : far) ^ 1u;
    y[i] = uint16_t(rounded >> 16);
  }
  return doubtful == 0;
}

typedef bool (*CertainGroup)(const uint16_t* const*, const float*, int64_t, uint16_t*);

template <bool power_of_two>
static CertainGroup certain_group_of(int count) {
  switch (count) {
    case 2: return certain_group<2, power_of_two>;
    case 3: return certain_group<3, power_of_two>;
    case 4: return certain_group<4, power_of_two>;
    case 5: return certain_group<5, power_of_two>;
    case 6: return certain_group<6, power_of_two>;
    case 7: return certain_group<7, power_of_two>;
    case 8: return certain_group<8, power_of_two>;
    default: return nullptr;
  }
}

static bool weighted_average(const void* const* inputs, const DType* types, const double* weights,
                             int count, void* out, DType out_type, int64_t n) {
  alignas(64) double acc[kBlock];
  float narrow[kMostCertain] = {};
  bool all_bf16 = out_type == DType::BF16 && count <= kMostCertain, power_of_two = weights[0] > 0;
  for (int k = 0; all_bf16 && k < count; k++) {
    narrow[k] = float(weights[k]);
    all_bf16 = types[k] == DType::BF16;
    power_of_two &= weights[k] == weights[0];
  }
  power_of_two &= (as_bits(narrow[0]) & 0x7fffffu) == 0 && double(narrow[0]) == weights[0];
  CertainGroup certain = !all_bf16      ? nullptr
                         : power_of_two ? certain_group_of<true>(count)
                                        : certain_group_of<false>(count);
  int64_t nonfinite = 0, tried = 0, doubted = 0;
  for (int64_t lo = 0, m = 0; lo < n; lo += m) {
    m = n - lo < kBlock ? n - lo : kBlock;
    if (certain && n - lo >= kGroup) {
      m = kGroup;
      tried++;
      if (certain(reinterpret_cast<const uint16_t* const*>(inputs), narrow, lo,
                  static_cast<uint16_t*>(out) + lo))
        continue;
      doubted++;
      // Weights like 0.1 and 0.4 hit the middle too often.
      if (tried >= 64 && 2 * doubted > tried) certain = nullptr;
    }
    for (int k = 0; k < count; k++) accumulate(inputs[k], types[k], lo, weights[k], k == 0, acc, m);
    nonfinite += store(acc, out, out_type, lo, m);
  }
  return nonfinite == 0;
}

// Adds to eight running sums, one per lane, and joins them in a fixed tree: the same bits for any
// vector width.
static double dot(const double* __restrict a, const double* __restrict b, int64_t n,
                  double* lanes) {
  for (int64_t i = 0; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; l++) lanes[l] += a[i + l] * b[i + l];
  for (int64_t i = n / 8 * 8; i < n; i++) lanes[i % 8] += a[i] * b[i];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

static void delta_gram(const void* const* inputs, const DType* types, int branches, bool from_base,
                       int64_t first, int64_t n, double* gram, double* scratch) {
  double* const base = scratch;
  double* const deltas = base + kBlock;
  double* const lanes = deltas + branches * kBlock;
  for (int i = 0; i < branches * branches * 8; i++) lanes[i] = 0.0;
  for (int64_t lo = 0; lo < n; lo += kBlock) {
    const int64_t m = n - lo < kBlock ? n - lo : kBlock;
    if (from_base) accumulate(inputs[branches], types[branches], first + lo, 1.0, true, base, m);
    for (int k = 0; k < branches; k++) {
      double* __restrict delta = deltas + k * kBlock;
      accumulate(inputs[k], types[k], first + lo, 1.0, true, delta, m);
      if (from_base)
        for (int64_t i = 0; i < m; i++) delta[i] -= base[i];
    }
    for (int i = 0; i < branches; i++)
      for (int j = i; j < branches; j++)
        gram[i * branches + j] =
            dot(deltas + i * kBlock, deltas + j * kBlock, m, lanes + (i * branches + j) * 8);
  }
}
