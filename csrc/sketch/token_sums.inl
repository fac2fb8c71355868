// Sums of dY, or of dY times X, over the tokens of each example: gradients of biases and of the
// scales of norms.

// Tokens of a block, which is summed before it is added: errors then grow with the number of
// blocks.
static const int kTokens = 32;

// Returns 1 / sqrt(mean of squares + epsilon) of a row.
template <class X>
static inline float inverse_rms(const X* x, int64_t cols, float epsilon) {
  float lanes[16] = {};
  int64_t c = 0;
  for (; c + 16 <= cols; c += 16)
    for (int j = 0; j < 16; j++) {
      const float value = value_of(x[c + j]);
      lanes[j] += value * value;
    }
  for (; c < cols; c++) lanes[0] += value_of(x[c]) * value_of(x[c]);
  float sum = 0.f;
  for (int j = 0; j < 16; j++) sum += lanes[j];
  return 1.f / std::sqrt(sum / float(cols) + epsilon);
}

// sums[j] = sum over `tokens` rows of dy[., j] * x[., j] * factor for up to 64 columns; without x,
// of dy[., j].
template <class Y, class X>
static inline void block_sums(const TokenSums& job, const Y* dy, const X* x, const float* factor,
                              int tokens, int cols, float* sums) {
  for (int j = 0; j < kTile; j++) sums[j] = 0.f;
  for (int t = 0; t < tokens; t++, dy += job.dy.row_stride) {
    if (x) {
      for (int j = 0; j < cols; j++) sums[j] += value_of(dy[j]) * (value_of(x[j]) * factor[t]);
      x += job.x.row_stride;
    } else {
      for (int j = 0; j < cols; j++) sums[j] += value_of(dy[j]);
    }
  }
}

template <class Y, class X>
static void sum_example(const TokenSums& job, int64_t b) {
  float* out = job.out + b * job.dy.cols;
  for (int64_t token = job.offsets[b]; token < job.offsets[b + 1]; token += kTokens) {
    const int64_t rest = job.offsets[b + 1] - token;
    const int tokens = rest < kTokens ? int(rest) : kTokens;
    const Y* dy = static_cast<const Y*>(job.dy.data) + token * job.dy.row_stride;
    const X* x =
        job.x.data ? static_cast<const X*>(job.x.data) + token * job.x.row_stride : nullptr;
    float factor[kTokens], sums[kTile];
    for (int t = 0; t < tokens; t++)
      factor[t] =
          x && job.normalize ? inverse_rms(x + t * job.x.row_stride, job.x.cols, job.epsilon) : 1.f;
    for (int64_t c = 0; c < job.dy.cols; c += kTile) {
      const int cols = job.dy.cols - c < kTile ? int(job.dy.cols - c) : kTile;
      block_sums(job, dy + c, x ? x + c : nullptr, factor, tokens, cols, sums);
      for (int j = 0; j < cols; j++) out[c + j] += sums[j];
    }
  }
}

static void token_sums(const TokenSums& job) {
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t b = 0; b < job.examples; b++) {
    if (job.dy.bf16)
      job.x.bf16 ? sum_example<uint16_t, uint16_t>(job, b) : sum_example<uint16_t, float>(job, b);
    else
      job.x.bf16 ? sum_example<float, uint16_t>(job, b) : sum_example<float, float>(job, b);
  }
}
