// TIES of bf16 models in one loop, after sums.inl: the steps of mix_deltas in deltas.inl, with the
// same bits, for rules that keep the largest deltas and elect a sign.

static const int kMostElected = 8;  // branches

// The cut of each branch, in the bits of sizes.
struct Cuts {
  int32_t below[kMostElected];  // keeps sizes above it
  int32_t value[kMostElected];  // counts sizes that equal it
  int64_t equal[kMostElected];
};

// Writes the merged values of n elements and adds to the counts of equal sizes. Returns a number
// that is not 0 where an input is not finite.
template <int K, bool normalize>
static int32_t elect_plain(const MixRule& rule, const void* const* inputs, int64_t at, int64_t n,
                           Cuts* cuts, double* __restrict out) {
  const uint16_t* x[K];
  double w[K];
  int32_t below[K], value[K], equal[K];
  for (int k = 0; k < K; k++) {
    x[k] = static_cast<const uint16_t*>(inputs[k]) + at;
    w[k] = rule.weight[k];
    below[k] = cuts->below[k];
    value[k] = cuts->value[k];
    equal[k] = 0;
  }
  const uint16_t* __restrict start = static_cast<const uint16_t*>(inputs[K]) + at;
  const double scale = rule.scale;
  int32_t bad = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const float base = widen(start[i]);
    double d[K], total = 0.0;
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const float other = widen(x[k][i]);
      const int32_t size = int32_t(as_bits(other - base) & 0x7fffffffu);
      const double delta = double(other) - double(base);
      bad += !(delta - delta == 0.0);
      equal[k] += size == value[k];
      const double weighted = delta * w[k];
      d[k] = size > below[k] ? weighted : 0.0;
      total += d[k];
    }
    double mixed = 0.0;
    double divisor = 0.0;
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const double toward = total >= 0.0 ? d[k] : -d[k];
      mixed += toward > 0.0 ? d[k] : 0.0;
      if (normalize) divisor += toward > 0.0 ? w[k] : 0.0;
    }
    if (normalize) mixed /= divisor != 0.0 ? divisor : 1.0;
    out[i] = double(base) + scale * mixed;
  }
  for (int k = 0; k < K; k++) cuts->equal[k] += equal[k];
  return bad;
}

#ifdef MERIT_AVX512
// Eight elements' deltas of one branch: its models' halves less the base, weighted where kept.
static inline __m512d weighted_deltas(__m256 other, __m512d base, __m512d weight, __mmask8 kept) {
  return _mm512_maskz_mul_pd(kept, _mm512_sub_pd(_mm512_cvtps_pd(other), base), weight);
}

// The merged values of eight elements from the weighted deltas of all branches.
template <int K, bool normalize>
static inline __m512d elect_eight(const __m512d* d, const __m512d* w, __m512d base, __m512d scale) {
  const __m512d zero = _mm512_setzero_pd(), sign = _mm512_set1_pd(-0.0);
  __m512d total = zero;
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) total = _mm512_add_pd(total, d[k]);
  const __mmask8 negative = _mm512_cmp_pd_mask(total, zero, _CMP_NGE_UQ);
  __m512d mixed = zero, divisor = zero;
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) {
    const __m512d toward = _mm512_mask_xor_pd(d[k], negative, d[k], sign);
    const __mmask8 elected = _mm512_cmp_pd_mask(toward, zero, _CMP_GT_OQ);
    mixed = _mm512_mask_add_pd(mixed, elected, mixed, d[k]);
    if (normalize) divisor = _mm512_mask_add_pd(divisor, elected, divisor, w[k]);
  }
  if (normalize) {
    const __mmask8 none = _mm512_cmp_pd_mask(divisor, zero, _CMP_EQ_OQ);
    mixed = _mm512_div_pd(mixed, _mm512_mask_mov_pd(divisor, none, _mm512_set1_pd(1.0)));
  }
  return _mm512_add_pd(base, _mm512_mul_pd(scale, mixed));
}

static inline __m512 widen_sixteen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Which of sixteen bf16 are not finite.
static inline __mmask16 nonfinite_of(__m256i bits) {
  const __m256i exponent = _mm256_set1_epi16(0x7f80);
  return _mm256_cmpeq_epi16_mask(_mm256_and_si256(bits, exponent), exponent);
}

// elect_plain for whole groups of sixteen elements.
template <int K, bool normalize>
static int32_t elect_sixteens(const MixRule& rule, const void* const* inputs, int64_t at, int64_t n,
                              Cuts* cuts, double* __restrict out) {
  const uint16_t* x[K];
  __m512d w[K];
  __m512i below[K], value[K], equal[K];
  for (int k = 0; k < K; k++) {
    x[k] = static_cast<const uint16_t*>(inputs[k]) + at;
    w[k] = _mm512_set1_pd(rule.weight[k]);
    below[k] = _mm512_set1_epi32(cuts->below[k]);
    value[k] = _mm512_set1_epi32(cuts->value[k]);
    equal[k] = _mm512_setzero_si512();
  }
  const uint16_t* start = static_cast<const uint16_t*>(inputs[K]) + at;
  const __m512d scale = _mm512_set1_pd(rule.scale);
  const __m512i absolute = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1);
  __mmask16 bad = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i base_bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + i));
    const __m512 base = widen_sixteen(base_bits);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(base));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(base, 1));
    __m512d d_low[K], d_high[K];
    bad |= nonfinite_of(base_bits);
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[k] + i));
      const __m512 other = widen_sixteen(bits);
      const __m512i size =
          _mm512_and_si512(_mm512_castps_si512(_mm512_sub_ps(other, base)), absolute);
      const __mmask16 same = _mm512_cmpeq_epi32_mask(size, value[k]);
      const __mmask16 kept = _mm512_cmpgt_epi32_mask(size, below[k]);
      bad |= nonfinite_of(bits);
      equal[k] = _mm512_mask_add_epi32(equal[k], same, equal[k], one);
      d_low[k] = weighted_deltas(_mm512_castps512_ps256(other), low, w[k], __mmask8(kept));
      d_high[k] =
          weighted_deltas(_mm512_extractf32x8_ps(other, 1), high, w[k], __mmask8(kept >> 8));
    }
    _mm512_storeu_pd(out + i, elect_eight<K, normalize>(d_low, w, low, scale));
    _mm512_storeu_pd(out + i + 8, elect_eight<K, normalize>(d_high, w, high, scale));
  }
  for (int k = 0; k < K; k++) {
    int32_t lanes[16];
    _mm512_storeu_si512(lanes, equal[k]);
    for (const int32_t count : lanes) cuts->equal[k] += count;
  }
  return bad;
}
#endif

template <int K, bool normalize>
static int32_t elect_block(const MixRule& rule, const void* const* inputs, int64_t at, int64_t n,
                           Cuts* cuts, double* __restrict out) {
  for (int k = 0; k < K; k++) cuts->equal[k] = 0;
  int64_t done = 0;
  int32_t bad = 0;
#ifdef MERIT_AVX512
  done = n / 16 * 16;
  bad += elect_sixteens<K, normalize>(rule, inputs, at, done, cuts, out);
#endif
  bad += elect_plain<K, normalize>(rule, inputs, at + done, n - done, cuts, out + done);
  return bad;
}

typedef int32_t (*ElectBlock)(const MixRule&, const void* const*, int64_t, int64_t, Cuts*, double*);

template <bool normalize>
static ElectBlock elect_block_of(int branches) {
  switch (branches) {
    case 1: return elect_block<1, normalize>;
    case 2: return elect_block<2, normalize>;
    case 3: return elect_block<3, normalize>;
    case 4: return elect_block<4, normalize>;
    case 5: return elect_block<5, normalize>;
    case 6: return elect_block<6, normalize>;
    case 7: return elect_block<7, normalize>;
    case 8: return elect_block<8, normalize>;
    default: return nullptr;
  }
}

// The function for a rule; null if it has steps that elect_block lacks.
static ElectBlock elect_block_for(const MixRule& rule, const DType* types) {
  const int count = rule.branches;
  if (!rule.elect || rule.low == nullptr || rule.by_variance || rule.stream != nullptr ||
      rule.plain_votes || rule.enlarge != nullptr || count > kMostElected)
    return nullptr;
  for (int k = 0; k < count; k++)
    if (types[k] != DType::BF16 || as_bits(rule.high[k]) != kNoSize) return nullptr;
  if (types[count] != DType::BF16) return nullptr;
  return rule.normalize ? elect_block_of<true>(count) : elect_block_of<false>(count);
}

// Merges a block and counts its ties down. Returns false, and changes nothing but `out`, where only
// some of a block's ties are to be kept.
static bool elect(ElectBlock block, const MixRule& rule, const void* const* inputs, int64_t at,
                  int64_t n, int64_t* low_ties, double* out, int64_t* nonfinite) {
  Cuts cuts;
  for (int k = 0; k < rule.branches; k++) {
    cuts.value[k] = int32_t(as_bits(rule.low[k]));
    cuts.below[k] = cuts.value[k] - (low_ties[k] > 0);
  }
  const int32_t bad = block(rule, inputs, at, n, &cuts, out);
  for (int k = 0; k < rule.branches; k++)
    if (low_ties[k] > 0 && cuts.equal[k] > low_ties[k]) return false;
  for (int k = 0; k < rule.branches; k++) low_ties[k] -= low_ties[k] > 0 ? cuts.equal[k] : 0;
  *nonfinite += bad;
  return true;
}
