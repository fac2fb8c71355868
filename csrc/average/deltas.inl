// Methods that drop elements of every branch's delta before they sum, after sums.inl. Every number
// has one definition for all levels; kernels/average/deltas.py is the same in NumPy.

static const int64_t kMix = kMixBlock;

static void load_floats(const void* data, DType type, int64_t at, int64_t n,
                        float* __restrict out) {
  switch (type) {
    case DType::BF16: {
      const uint16_t* __restrict x = static_cast<const uint16_t*>(data) + at;
      for (int64_t i = 0; i < n; i++) out[i] = as_float(uint32_t(x[i]) << 16);
      break;
    }
    case DType::F16: {
      const uint16_t* __restrict x = static_cast<const uint16_t*>(data) + at;
      for (int64_t i = 0; i < n; i++) out[i] = half_to_float(x[i]);
      break;
    }
    default: std::memcpy(out, static_cast<const float*>(data) + at, size_t(n) * 4);
  }
}

static void load_delta(const void* data, DType type, int64_t at, int64_t n,
                       const double* __restrict base, double* __restrict delta) {
  switch (type) {
    case DType::BF16: {
      const uint16_t* __restrict x = static_cast<const uint16_t*>(data) + at;
      for (int64_t i = 0; i < n; i++) delta[i] = double(as_float(uint32_t(x[i]) << 16)) - base[i];
      break;
    }
    default:
      accumulate(data, type, at, 1.0, true, delta, n);
      for (int64_t i = 0; i < n; i++) delta[i] -= base[i];
  }
}

static void delta_sizes(const void* const* inputs, const DType* types, int branches, int k,
                        int64_t at, int64_t n, float* __restrict sizes) {
  double delta[kMix], start[kMix], sum[kMix], squares[kMix];
  float base[kMix];
  const bool wide = k == kVariance || types[k] == DType::F64 || types[branches] == DType::F64;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    float* __restrict size = sizes + lo;
    if (wide) accumulate(inputs[branches], types[branches], at + lo, 1.0, true, start, m);
    if (k == kVariance) {
      for (int64_t i = 0; i < m; i++) sum[i] = squares[i] = 0.0;
      for (int j = 0; j < branches; j++) {
        load_delta(inputs[j], types[j], at + lo, m, start, delta);
        for (int64_t i = 0; i < m; i++) sum[i] += delta[i];
      }
      for (int j = 0; j < branches; j++) {
        load_delta(inputs[j], types[j], at + lo, m, start, delta);
        for (int64_t i = 0; i < m; i++) {
          const double off = delta[i] - sum[i] / branches;
          squares[i] += off * off;
        }
      }
      for (int64_t i = 0; i < m; i++)
        size[i] = as_float(as_bits(float(squares[i] / branches)) & 0x7fffffffu);
    } else if (wide) {
      load_delta(inputs[k], types[k], at + lo, m, start, delta);
      for (int64_t i = 0; i < m; i++) size[i] = as_float(as_bits(float(delta[i])) & 0x7fffffffu);
    } else if (types[k] == DType::BF16 && types[branches] == DType::BF16) {
      const uint16_t* __restrict x = static_cast<const uint16_t*>(inputs[k]) + at + lo;
      const uint16_t* __restrict b = static_cast<const uint16_t*>(inputs[branches]) + at + lo;
      for (int64_t i = 0; i < m; i++) {
        const float delta = as_float(uint32_t(x[i]) << 16) - as_float(uint32_t(b[i]) << 16);
        size[i] = as_float(as_bits(delta) & 0x7fffffffu);
      }
    } else {
      load_floats(inputs[k], types[k], at + lo, m, size);
      load_floats(inputs[branches], types[branches], at + lo, m, base);
      for (int64_t i = 0; i < m; i++) size[i] = as_float(as_bits(size[i] - base[i]) & 0x7fffffffu);
    }
  }
}

static void count_sizes(const float* sizes, int64_t n, float value, int64_t* above,
                        int64_t* equal) {
  const int32_t wanted = int32_t(as_bits(value));
  int64_t more = 0, same = 0;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    const float* __restrict size = sizes + lo;
    int32_t block_more = 0, block_same = 0;
    for (int64_t i = 0; i < m; i++) {
      const int32_t bits = int32_t(as_bits(size[i]));
      block_more += bits > wanted, block_same += bits == wanted;
    }
    more += block_more, same += block_same;
  }
  *above = more, *equal = same;
}

static int64_t pick_sizes(const float* sizes, int64_t n, uint32_t low, uint32_t high,
                          uint32_t* picked, int64_t* above) {
  int64_t count = 0, more = 0, i = 0;
#ifdef MERIT_AVX512
  const __m512i first = _mm512_set1_epi32(int(low)), end = _mm512_set1_epi32(int(high));
  for (; i + 16 <= n; i += 16) {
    const __m512i bits = _mm512_loadu_si512(sizes + i);
    const __mmask16 over = _mm512_cmpge_epu32_mask(bits, end),
                    in = _mm512_cmpge_epu32_mask(bits, first) & ~over;
    more += __builtin_popcount(over);
    _mm512_storeu_si512(picked + count, _mm512_maskz_compress_epi32(in, bits));
    count += __builtin_popcount(in);
  }
#endif
  for (; i < n; i++) {
    const uint32_t bits = as_bits(sizes[i]);
    picked[count] = bits;
    count += bits >= low && bits < high;
    more += bits >= high;
  }
  *above = more;
  return count;
}

// in[i] tells whether element i is among the largest that the cut keeps. ties: how many elements
// that equal the cut are still to be kept; counted down.
static void among_largest(const float* __restrict sizes, int64_t n, float value, int64_t* ties,
                          int32_t* __restrict in) {
  int64_t above, equal;
  count_sizes(sizes, n, value, &above, &equal);
  const int32_t border = int32_t(as_bits(value));
  if (equal <= *ties) {
    for (int64_t i = 0; i < n; i++) in[i] = int32_t(as_bits(sizes[i])) >= border;
  } else {
    for (int64_t i = 0; i < n; i++) in[i] = int32_t(as_bits(sizes[i])) > border;
    int64_t left = *ties;
    for (int64_t i = 0; i < n && left > 0; i++)
      if (int32_t(as_bits(sizes[i])) == border) in[i] = 1, left--;
  }
  *ties -= equal < *ties ? equal : *ties;
}

// kept[i] tells whether element i passes the `low` cut and not the `high` cut.
static void keep_by_size(const MixRule& rule, const void* const* inputs, const DType* types, int k,
                         int64_t at, int64_t n, int64_t* low_ties, int64_t* high_ties,
                         int32_t* kept) {
  float sizes[kMix];
  int32_t dropped[kMix];
  delta_sizes(inputs, types, rule.branches, rule.by_variance ? kVariance : k, at, n, sizes);
  among_largest(sizes, n, rule.low[k], low_ties + k, kept);
  if (as_bits(rule.high[k]) == kNoSize) return;
  among_largest(sizes, n, rule.high[k], high_ties + k, dropped);
  for (int64_t i = 0; i < n; i++) kept[i] &= ~dropped[i];
}

// Returns the number in [0, 1) that the stream holds for an element.
static inline double uniform(uint64_t stream, uint64_t element) {
  return double(splitmix64(stream, element) >> 11) * 0x1p-53;
}

static void keep_by_chance(const MixRule& rule, int k, int64_t element, const uint32_t* ranks,
                           int64_t n, double* __restrict delta) {
  const double density = rule.density[k], epsilon = rule.epsilon[k], last = double(rule.row - 1);
  const uint64_t stream = rule.stream[k];
  if (ranks == nullptr) {
    const double divisor = rule.divide ? density : 1.0;
    for (int64_t i = 0; i < n; i++) {
      const double enlarged = delta[i] / divisor;
      delta[i] = uniform(stream, uint64_t(element + i)) < density ? enlarged : 0.0;
    }
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    const double p =
        rule.row > 1 ? (density - epsilon) + 2.0 * epsilon * (double(ranks[i]) / last) : density;
    const double enlarged = rule.divide ? delta[i] / p : delta[i];
    delta[i] = uniform(stream, uint64_t(element + i)) < p ? enlarged : 0.0;
  }
}

static int32_t count_nonfinite(const double* __restrict d, int64_t n) {
  int32_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad += !(d[i] - d[i] == 0.0);
  return bad;
}

// d = w * d where kept (null: everywhere), else 0. The total gets the new d, or with plain_votes
// the kept d before weighting. Returns the number of d that are not finite.
static int32_t weigh(const int32_t* __restrict kept, double w, bool plain_votes, int64_t n,
                     double* __restrict d, double* __restrict total) {
  if (plain_votes)
    for (int64_t i = 0; i < n; i++) total[i] += kept == nullptr || kept[i] ? d[i] : 0.0;
  int32_t bad = 0;
  if (kept == nullptr)
    for (int64_t i = 0; i < n; i++) {
      bad += !(d[i] - d[i] == 0.0);
      d[i] *= w;
    }
  else
    for (int64_t i = 0; i < n; i++) {
      const double weighted = d[i] * w;
      bad += !(d[i] - d[i] == 0.0);
      d[i] = kept[i] ? weighted : 0.0;
    }
  if (!plain_votes)
    for (int64_t i = 0; i < n; i++) total[i] += d[i];
  return bad;
}

static void elect_and_sum(const MixRule& rule, const double* deltas, const double* __restrict total,
                          int64_t n, double* __restrict mixed) {
  double divisor[kMix];
  for (int64_t i = 0; i < n; i++) mixed[i] = divisor[i] = 0.0;
  for (int k = 0; k < rule.branches; k++) {
    const double* __restrict d = deltas + k * kMix;
    const double w = rule.weight[k];
    for (int64_t i = 0; i < n; i++) {
      const double toward = total[i] >= 0.0 ? d[i] : -d[i];
      mixed[i] += toward > 0.0 ? d[i] : 0.0;
      divisor[i] += toward > 0.0 ? w : 0.0;
    }
  }
  if (rule.normalize)
    for (int64_t i = 0; i < n; i++) mixed[i] /= divisor[i] != 0.0 ? divisor[i] : 1.0;
}

static bool mix_deltas(const MixRule& rule, const void* const* inputs, const DType* types,
                       int64_t element, int64_t n, int64_t* low_ties, int64_t* high_ties,
                       const uint32_t* ranks, void* out, DType out_type, double* scratch) {
  const int count = rule.branches;
  double total[kMix], mixed[kMix], base[kMix];
  int32_t kept[kMix];
  int64_t nonfinite = 0;
  const ElectBlock block = elect_block_for(rule, types);
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    if (block && elect(block, rule, inputs, lo, m, low_ties, base, &nonfinite)) {
      nonfinite += store(base, out, out_type, lo, m);
      continue;
    }
    accumulate(inputs[count], types[count], lo, 1.0, true, base, m);
    for (int64_t i = 0; i < m; i++) total[i] = 0.0;
    for (int k = 0; k < count; k++) {
      double* __restrict d = scratch + k * kMix;
      load_delta(inputs[k], types[k], lo, m, base, d);
      if (rule.stream != nullptr) {
        nonfinite += count_nonfinite(d, m);
        keep_by_chance(rule, k, element + lo, ranks ? ranks + k * n + lo : nullptr, m, d);
      }
      if (rule.enlarge != nullptr) {
        const double factor = rule.enlarge[k];
        for (int64_t i = 0; i < m; i++) d[i] *= factor;
      }
      if (rule.low != nullptr && (k == 0 || !rule.by_variance))
        keep_by_size(rule, inputs, types, k, lo, m, low_ties, high_ties, kept);
      nonfinite += weigh(rule.low != nullptr ? kept : nullptr, rule.weight[k], rule.plain_votes, m,
                         d, total);
    }
    if (rule.elect) elect_and_sum(rule, scratch, total, m, mixed);
    const double* __restrict step = rule.elect ? mixed : total;
    for (int64_t i = 0; i < m; i++) base[i] += rule.scale * step[i];
    nonfinite += store(base, out, out_type, lo, m);
  }
  return nonfinite == 0;
}

// The squares go to eight running sums, which are joined in a fixed tree.
static void kept_squares(const MixRule& rule, const void* const* inputs, const DType* types,
                         int64_t n, int64_t* low_ties, int64_t* high_ties, double* squares,
                         double* lanes) {
  const int count = rule.branches;
  double delta[kMix], base[kMix];
  int32_t kept[kMix];
  for (int i = 0; i < count * 8; i++) lanes[i] = 0.0;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    accumulate(inputs[count], types[count], lo, 1.0, true, base, m);
    for (int k = 0; k < count; k++) {
      load_delta(inputs[k], types[k], lo, m, base, delta);
      if (rule.low != nullptr) {
        if (k == 0 || !rule.by_variance)
          keep_by_size(rule, inputs, types, k, lo, m, low_ties, high_ties, kept);
        for (int64_t i = 0; i < m; i++) delta[i] = kept[i] ? delta[i] : 0.0;
      }
      squares[k] = dot(delta, delta, m, lanes + k * 8);
    }
  }
}

static void low_rank_rows(const double* base, const float* left, const float* right, int64_t rank,
                          int64_t cols, double factor, int64_t first, int64_t n, double* out) {
  double sum[kMix];
  for (int64_t lo = 0, m = 0; lo < n; lo += m) {
    const int64_t row = (first + lo) / cols, col = (first + lo) % cols;
    m = cols - col < n - lo ? cols - col : n - lo;
    m = m < kMix ? m : kMix;
    for (int64_t i = 0; i < m; i++) sum[i] = 0.0;
    for (int64_t r = 0; r < rank; r++) {
      const float* __restrict a = right + r * cols + col;
      const double b = double(left[row * rank + r]);
      for (int64_t i = 0; i < m; i++) sum[i] += b * double(a[i]);
    }
    for (int64_t i = 0; i < m; i++) out[lo + i] = base[lo + i] + factor * sum[i];
  }
}
