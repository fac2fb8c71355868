// The steps of linear + cross-entropy between the matrix products. One thread takes a token's row,
// in blocks that stay in L1 and in one order, so no bit depends on the number of threads.

static const int kLogits = 1024;  // of a block
static const int kLossLanes = 16;

// Computes n logits from column c on, with bias, scale, softcap and sharpness, and the slope of the
// softcap if `slope` is not null.
template <class T>
static inline void final_logits(const LogitsTile& job, int64_t row, int64_t c, int n, float* z,
                                float* slope) {
  const T* logits = static_cast<const T*>(job.logits) + row * job.columns + c;
  for (int j = 0; j < n; j++) z[j] = value_of(logits[j]);
  if (job.bias)
    for (int j = 0; j < n; j++) z[j] += job.bias[c + j];
  if (job.scale != 1.f)
    for (int j = 0; j < n; j++) z[j] *= job.scale;
  if (job.softcap > 0.f) {
    const float cap = job.softcap, inverse = 1.f / cap;
    if (slope)
      for (int j = 0; j < n; j++) slope[j] = tanh_slope(z[j] * inverse);
    for (int j = 0; j < n; j++) z[j] = cap * tanh_of(z[j] * inverse);
  }
  if (job.sharpness != 1.f)
    for (int j = 0; j < n; j++) z[j] *= job.sharpness;
}

static inline float largest(const float* z, int n) {
  const float low = as_float(0xff800000u);
  float lanes[kLossLanes];
  for (int j = 0; j < kLossLanes; j++) lanes[j] = low;
  int c = 0;
  for (; c + kLossLanes <= n; c += kLossLanes)
    for (int j = 0; j < kLossLanes; j++) lanes[j] = z[c + j] > lanes[j] ? z[c + j] : lanes[j];
  float top = low;
  for (; c < n; c++) top = z[c] > top ? z[c] : top;
  for (int j = 0; j < kLossLanes; j++) top = lanes[j] > top ? lanes[j] : top;
  return top;
}

// Adds the sums of e^(z - shift) and of z, and with `Weighted` that of (z - shift) e^(z - shift).
template <bool Weighted>
static inline void exponential_sums(const float* z, int n, float shift, double* exponentials,
                                    double* plain, double* weighted) {
  float e[kLossLanes] = {}, s[kLossLanes] = {}, w[kLossLanes] = {};
  int c = 0;
  for (; c + kLossLanes <= n; c += kLossLanes) {
    for (int j = 0; j < kLossLanes; j++) {
      const float x = Weighted ? exponent_of(z[c + j] - shift) : z[c + j] - shift;
      const float power = exp_of(x);
      e[j] += power;
      if (Weighted) w[j] += x * power;
    }
    for (int j = 0; j < kLossLanes; j++) s[j] += z[c + j];
  }
  for (; c < n; c++) {
    const float x = exponent_of(z[c] - shift);
    *exponentials += double(exp_of(x));
    *plain += double(z[c]);
    if (Weighted) *weighted += double(x * exp_of(x));
  }
  for (int j = 0; j < kLossLanes; j++) {
    *exponentials += double(e[j]);
    *plain += double(s[j]);
    if (Weighted) *weighted += double(w[j]);
  }
}

template <class T>
static void update_row(const LossUpdate& job, int64_t row) {
  double *top = job.state + row, *sum = top + job.stride, *target = sum + job.stride,
         *plain = target + job.stride, *weighted = plain + job.stride,
         *before = weighted + job.stride;
  const int64_t label = job.labels[row] - job.first;
  float z[kLogits];
  for (int64_t c = 0; c < job.columns; c += kLogits) {
    const int n = job.columns - c < kLogits ? int(job.columns - c) : kLogits;
    final_logits<T>(job, row, c, n, z, nullptr);
    const double high = double(largest(z, n));
    if (high > *top) {
      const double decay = std::exp(*top - high);  // 0 at first: the maximum is still -infinity
      if (job.statistics && *sum > 0.) *weighted = (*weighted + *sum * (*top - high)) * decay;
      *sum *= decay;
      *top = high;
    }
    // If all logits so far are -infinity, any shift gives their sum of 0.
    const float shift = float(*top) == as_float(0xff800000u) ? 0.f : float(*top);
    if (label >= c && label < c + n) *target = double(z[label - c]);
    if (!job.statistics) {
      exponential_sums<false>(z, n, shift, sum, plain, nullptr);
      continue;
    }
    exponential_sums<true>(z, n, shift, sum, plain, weighted);
    const int64_t earlier = label - c < n ? label - c : n;  // words of the block before the label
    if (earlier > 0) *before = fmax(*before, double(largest(z, int(earlier))));
  }
}

template <class T>
static void gradient_row(const LossGradient& job, int64_t row) {
  const float shift = job.terms[row], factor = job.terms[row + job.stride];
  const float target = job.terms[row + 2 * job.stride], uniform = job.terms[row + 3 * job.stride];
  const float linear = job.linear ? job.terms[row + 4 * job.stride] : 0.f;
  const float slope_of_factors = job.scale * job.sharpness;
  const int64_t label = job.labels[row] - job.first;
  float z[kLogits], d[kLogits], slope[kLogits];
  for (int64_t c = 0; c < job.columns; c += kLogits) {
    const int n = job.columns - c < kLogits ? int(job.columns - c) : kLogits;
    final_logits<T>(job, row, c, n, z, slope);
    if (job.linear) {
      for (int j = 0; j < n; j++) {
        const float x = exponent_of(z[j] - shift);
        d[j] = (factor + linear * x) * exp_of(x) - uniform;
      }
    } else {
      for (int j = 0; j < n; j++) d[j] = factor * exp_of(z[j] - shift) - uniform;
    }
    if (label >= c && label < c + n) d[label - c] -= target;
    if (job.softcap > 0.f)
      for (int j = 0; j < n; j++) d[j] *= slope[j];
    if (slope_of_factors != 1.f)
      for (int j = 0; j < n; j++) d[j] *= slope_of_factors;
    T* out = static_cast<T*>(job.out) + row * job.columns + c;
    for (int j = 0; j < n; j++) out[j] = rounded_to<T>(d[j]);
  }
}

static void loss_update(const LossUpdate& job) {
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t row = 0; row < job.rows; row++)
    job.bf16 ? update_row<uint16_t>(job, row) : update_row<float>(job, row);
}

static void loss_gradient(const LossGradient& job) {
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t row = 0; row < job.rows; row++)
    job.bf16 ? gradient_row<uint16_t>(job, row) : gradient_row<float>(job, row);
}

extern const LossKernels loss_kernels = {
    .update = loss_update,
    .gradient = loss_gradient,
};
