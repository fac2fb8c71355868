// Weighted averages in fp64, rounded once to the output type, and Gram matrices. Loops are plain,
// so that the compiler vectorizes them at each level.

static const int64_t kBlock = kAverageBlock;
static const int kMostCertain = 8;  // inputs

static const int64_t kGroup = 128;

// Rounds the fp32 sums of kGroup elements of bf16 inputs to bf16, and returns whether every fp64
// sum provably rounds to the same; only then y, which may be an input, is written. With
// size = sum|w x| the fp32 sum is off by at most (K + 3) 2^-24 size. This is safe if twice that
// does not reach the middle between two bf16. Sums by equal weights that are a power of two often
// hit that middle, but exactly: they have no error while size <= 2^15 min|w x|.
template <int K, bool power_of_two>
static bool certain_group(const uint16_t* const* inputs, const float* weights, int64_t at,
                          uint16_t* y) {
  const uint16_t* x[K];
  float w[K];
  for (int k = 0; k < K; k++) x[k] = inputs[k] + at, w[k] = weights[k];
  const float error = float(2 * (K + 4)) * 0x1p-24f;
  uint16_t result[kGroup];
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
    result[i] = uint16_t(rounded >> 16);
  }
  if (doubtful) return false;
  std::memcpy(y, result, sizeof result);
  return true;
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
  int64_t nonfinite = 0, tried = 0, doubted = 0, done = 0;
#ifdef MERIT_AVX512
  if (AverageGroups groups =
          all_bf16 && power_of_two ? average_groups_of(weights[0], count) : nullptr) {
    done = n / 32 * 32;
    nonfinite = groups(inputs, weights[0], done, static_cast<uint16_t*>(out));
  }
#endif
  for (int64_t lo = done, m = 0; lo < n; lo += m) {
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
