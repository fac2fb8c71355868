// Methods that decide element by element which models count, after deltas.inl. Blocks are doubles;
// kernels/average/elements.py is the same in NumPy.

// Loads a block of the base and of every model as doubles. models: [count, kMixBlock].
static void load_block(const void* const* inputs, const DType* types, int count, int64_t at,
                       int64_t n, double* base, double* models) {
  accumulate(inputs[count], types[count], at, 1.0, true, base, n);
  for (int k = 0; k < count; k++)
    accumulate(inputs[k], types[k], at, 1.0, true, models + k * kMix, n);
}

static inline double size_of(double d) { return d < 0.0 ? -d : d; }

static bool mix_near(const void* const* inputs, const DType* types, double t, int64_t n, void* out,
                     DType out_type) {
  double base[kMix], other[kMix];
  int64_t bad = 0;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    load_block(inputs, types, 1, lo, m, base, other);
    for (int64_t i = 0; i < m; i++) {
      const double d = other[i] - base[i];
      const double size = size_of(d);
      const double ratio = t / (size > 1e-6 ? size : 1e-6);
      const double share = ratio < 1.0 ? ratio : 1.0;
      bad += !(d - d == 0.0);
      base[i] += share * d;
    }
    bad += store(base, out, out_type, lo, m);
  }
  return bad == 0;
}

// active[i] = number of models whose delta is larger than epsilon.
static void count_active(const double* __restrict base, const double* models, int count,
                         double epsilon, int64_t n, int32_t* __restrict active) {
  for (int64_t i = 0; i < n; i++) active[i] = 0;
  for (int k = 0; k < count; k++) {
    const double* __restrict x = models + k * kMix;
    for (int64_t i = 0; i < n; i++) active[i] += size_of(x[i] - base[i]) > epsilon;
  }
}

static void tally_active(const void* const* inputs, const DType* types, int count, double epsilon,
                         int64_t n, int64_t* shared, int64_t* unique, double* models) {
  double base[kMix];
  int32_t active[kMix];
  for (int k = 0; k < count; k++) shared[k] = unique[k] = 0;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    load_block(inputs, types, count, lo, m, base, models);
    count_active(base, models, count, epsilon, m, active);
    for (int k = 0; k < count; k++) {
      const double* __restrict x = models + k * kMix;
      int32_t several = 0;
      int32_t single = 0;
      for (int64_t i = 0; i < m; i++) {
        const int32_t mine = size_of(x[i] - base[i]) > epsilon;
        several += mine & int32_t(active[i] > 1);
        single += mine & int32_t(active[i] == 1);
      }
      shared[k] += several;
      unique[k] += single;
    }
  }
}

static bool mix_active(const void* const* inputs, const DType* types, int count, double epsilon,
                       const double* factor, int64_t n, void* out, DType out_type, double* models) {
  double base[kMix], step[kMix];
  int32_t active[kMix];
  int64_t bad = 0;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    load_block(inputs, types, count, lo, m, base, models);
    count_active(base, models, count, epsilon, m, active);
    for (int64_t i = 0; i < m; i++) step[i] = 0.0;
    for (int k = 0; k < count; k++) {
      const double* __restrict x = models + k * kMix;
      for (int64_t i = 0; i < m; i++) {
        const double d = x[i] - base[i];
        const double part = active[i] > 1 ? d / double(active[i]) : d * factor[k];
        bad += !(d - d == 0.0);
        step[i] += size_of(d) > epsilon ? part : 0.0;
      }
    }
    for (int64_t i = 0; i < m; i++) base[i] += step[i];
    bad += store(base, out, out_type, lo, m);
  }
  return bad == 0;
}

// e^x for x <= 0, to about 1e-16 of its value; below -700 it is e^-700.
static inline double exponential(double x) {
  const double magic = 0x1.8p52;
  const double low = x > -700.0 ? x : -700.0;
  const double shifted = low * 0x1.71547652b82fep0 + magic;
  const double k = shifted - magic;
  const double r = (low - k * 0x1.62e42fee00000p-1) - k * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * as_double((as_wide(shifted) << 52) + 0x3ff0000000000000u);
}

// The natural logarithm of a positive normal number, to about 1e-16 absolute near 1.
static inline double logarithm(double x) {
  const uint64_t bits = as_wide(x);
  const double fraction = as_double((bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
  const bool large = fraction > 0x1.6a09e667f3bcdp0;
  const double m = large ? fraction * 0.5 : fraction;
  const double e = double(int32_t(bits >> 52) - 1023 + int32_t(large));
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double p = 1.0 / 23.0;
  p = p * z + 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  p = p * z + 1.0;
  return e * 0x1.62e42fefa39efp-1 + 2.0 * s * p;
}

// The sum of x in eight running sums, which are joined in a fixed tree.
static double sum_lanes(const double* __restrict x, int64_t n) {
  double lanes[8] = {};
  for (int64_t i = 0; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; l++) lanes[l] += x[i + l];
  for (int64_t i = n / 8 * 8; i < n; i++) lanes[i % 8] += x[i];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// out = e^(x - max x). Returns its sum.
static double exponentials(const double* __restrict x, int64_t n, double* __restrict out) {
  double most = -HUGE_VAL;
  for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
  for (int64_t i = 0; i < n; i++) out[i] = exponential(x[i] - most);
  return sum_lanes(out, n);
}

static bool row_importance(const void* const* inputs, const DType* types, int64_t at, int64_t n,
                           float* __restrict importance, double* scratch) {
  double* __restrict other = scratch;
  double* __restrict base = scratch + n;
  double* __restrict p = scratch + 2 * n;
  double* __restrict q = scratch + 3 * n;
  accumulate(inputs[0], types[0], at, 1.0, true, other, n);
  accumulate(inputs[1], types[1], at, 1.0, true, base, n);
  const double p_sum = exponentials(other, n, p);
  const double q_sum = exponentials(base, n, q);
  for (int64_t i = 0; i < n; i++) {
    const double a = p[i] / p_sum + 1e-8;
    const double b = q[i] / q_sum + 1e-8;
    p[i] = a * logarithm(a / b);
  }
  const double sum = sum_lanes(p, n);
  const double divergence = sum > 0.0 ? sum : 0.0;
  int64_t bad = 0;
  for (int64_t i = 0; i < n; i++) {
    const double d = other[i] - base[i];
    bad += !(d - d == 0.0);
    importance[i] = as_float(as_bits(float(d * divergence)) & 0x7fffffffu);
  }
  return bad == 0;
}

static bool mix_important(const void* const* inputs, const DType* types, const float* importance,
                          double threshold, int64_t n, void* out, DType out_type) {
  double base[kMix], other[kMix];
  int64_t bad = 0;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    const float* __restrict size = importance + lo;
    load_block(inputs, types, 1, lo, m, base, other);
    for (int64_t i = 0; i < m; i++) base[i] = double(size[i]) >= threshold ? other[i] : base[i];
    bad += store(base, out, out_type, lo, m);
  }
  return bad == 0;
}

static void add_products(const void* const* inputs, const DType* types, int branches,
                         bool from_base, int64_t n, double* gram, double* deltas) {
  double base[kMix];
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    if (from_base) accumulate(inputs[branches], types[branches], lo, 1.0, true, base, m);
    for (int k = 0; k < branches; k++) {
      double* __restrict d = deltas + k * kMix;
      accumulate(inputs[k], types[k], lo, 1.0, true, d, m);
      if (from_base)
        for (int64_t i = 0; i < m; i++) d[i] -= base[i];
    }
    for (int a = 0; a < branches; a++)
      for (int b = a; b < branches; b++) {
        double* __restrict sum = gram + (a * branches + b) * n + lo;
        const double* __restrict x = deltas + a * kMix;
        const double* __restrict y = deltas + b * kMix;
        for (int64_t i = 0; i < m; i++) sum[i] += x[i] * y[i];
      }
  }
}

static bool weighted_columns(const void* const* inputs, const DType* types, const double* weights,
                             int count, int64_t n, void* out, DType out_type) {
  double value[kMix], sum[kMix];
  int64_t bad = 0;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    for (int k = 0; k < count; k++) {
      const double* __restrict w = weights + k * n + lo;
      accumulate(inputs[k], types[k], lo, 1.0, true, value, m);
      if (k == 0)
        for (int64_t i = 0; i < m; i++) sum[i] = w[i] * value[i];
      else
        for (int64_t i = 0; i < m; i++) sum[i] += w[i] * value[i];
    }
    bad += store(sum, out, out_type, lo, m);
  }
  return bad == 0;
}

static void kept_sizes(const MixRule& rule, const void* const* inputs, const DType* types,
                       int64_t n, int64_t* low_ties, int64_t* high_ties, double* sums,
                       double* lanes) {
  const int count = rule.branches;
  double size[kMix], base[kMix], one[kMix];
  int32_t kept[kMix];
  for (int i = 0; i < count * 16; i++) lanes[i] = 0.0;
  for (int64_t i = 0; i < kMix; i++) one[i] = 1.0;
  for (int64_t lo = 0; lo < n; lo += kMix) {
    const int64_t m = n - lo < kMix ? n - lo : kMix;
    accumulate(inputs[count], types[count], lo, 1.0, true, base, m);
    for (int k = 0; k < count; k++) {
      load_delta(inputs[k], types[k], lo, m, base, size);
      for (int64_t i = 0; i < m; i++) size[i] = size[i] < 0.0 ? -size[i] : size[i];
      sums[k] = dot(size, one, m, lanes + k * 8);
      keep_by_size(rule, inputs, types, k, lo, m, low_ties, high_ties, kept);
      for (int64_t i = 0; i < m; i++) size[i] = kept[i] ? size[i] : 0.0;
      sums[count + k] = dot(size, one, m, lanes + (count + k) * 8);
    }
  }
}
