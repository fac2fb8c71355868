// LayerNorm, forward and backward.

// The mean is mean + rest: a float of it would be wrong by half a unit, which a row far from zero
// feels.
struct RowMoments {
  float mean, rest, inverse;
};

static inline float distance_of(float x, const RowMoments& of) { return (x - of.mean) - of.rest; }

template <class X>
static inline float row_mean(const X* __restrict x, int64_t cols) {
  float lanes[kNormLanes] = {};
  int64_t c = 0;
  for (; c + kNormLanes <= cols; c += kNormLanes)
    for (int j = 0; j < kNormLanes; j++) lanes[j] += value_of(x[c + j]);
  for (int j = 0; c < cols; c++, j++) lanes[j] += value_of(x[c]);
  return sum_of_lanes(lanes) / float(cols);
}

// Sums of distances from ``mean`` and of their squares become moments.
static inline RowMoments moments_of(float mean, float* rests, float* squares, int64_t cols,
                                    float epsilon) {
  const float rest = sum_of_lanes(rests) / float(cols);
  const float variance = sum_of_lanes(squares) / float(cols) - rest * rest;
  return {mean, rest, 1.f / std::sqrt((variance < 0.f ? 0.f : variance) + epsilon)};
}

// Mean and inverse standard deviation of a row, by its distances from the mean.
template <class X>
static inline RowMoments row_moments(const X* __restrict x, int64_t cols, float epsilon) {
  const float mean = row_mean(x, cols);
  float rests[kNormLanes] = {}, squares[kNormLanes] = {};
  const auto add = [&](int64_t c, int j) {
    const float distance = value_of(x[c]) - mean;
    rests[j] += distance;
    squares[j] += distance * distance;
  };
  int64_t c = 0;
  for (; c + kNormLanes <= cols; c += kNormLanes)
    for (int j = 0; j < kNormLanes; j++) add(c + j, j);
  for (int j = 0; c < cols; c++, j++) add(c, j);
  return moments_of(mean, rests, squares, cols, epsilon);
}

template <class X>
static void layer_norm_rows(const LayerNormJob& job) {
  const int64_t cols = job.cols;
  const float* __restrict scale = job.scale;
  const float* __restrict shift = job.shift;
#pragma omp parallel for schedule(static) num_threads(useful_threads(job.rows* cols, job.threads))
  for (int64_t row = 0; row < job.rows; row++) {
    const X* __restrict x = row_of<X>(job.x, row);
    X* __restrict out = row_of<X>(job.out, row);
    const RowMoments of = row_moments(x, cols, job.epsilon);
    for (int64_t c = 0; c < cols; c++)
      out[c] = rounded_to<X>(distance_of(value_of(x[c]), of) * of.inverse * scale[c] + shift[c]);
  }
}

static void layer_norm(const LayerNormJob& job) {
  job.x.bf16 ? layer_norm_rows<uint16_t>(job) : layer_norm_rows<float>(job);
}

// dx = (g - mean(g) - y * mean(g * y)) / deviation with g = dout * scale and y the normed row;
// dscale += dout * y; dshift += dout.
template <class X, bool kSums>
static inline void layer_norm_backward_row(const LayerNormBackward& job, int64_t row,
                                           float* __restrict dscale, float* __restrict dshift) {
  const int64_t cols = job.cols;
  const X* __restrict dout = row_of<X>(job.dout, row);
  const X* __restrict x = row_of<X>(job.x, row);
  const float* __restrict scale = job.scale;
  X* __restrict dx = row_of<X>(job.dx, row);
  const float mean = row_mean(x, cols);
  float rests[kNormLanes] = {}, squares[kNormLanes] = {};
  float sums[kNormLanes] = {}, products[kNormLanes] = {};
  const auto add = [&](int64_t c, int j) {
    const float distance = value_of(x[c]) - mean;
    const float gradient = value_of(dout[c]) * scale[c];
    rests[j] += distance;
    squares[j] += distance * distance;
    sums[j] += gradient;
    products[j] += gradient * distance;
  };
  int64_t c = 0;
  for (; c + kNormLanes <= cols; c += kNormLanes)
    for (int j = 0; j < kNormLanes; j++) add(c + j, j);
  for (int j = 0; c < cols; c++, j++) add(c, j);
  const RowMoments of = moments_of(mean, rests, squares, cols, job.epsilon);
  const float sum = sum_of_lanes(sums);
  const float product = sum_of_lanes(products) - sum * of.rest;
  const float level = sum / float(cols);
  const float along = product * of.inverse / float(cols) * of.inverse;
  for (c = 0; c < cols; c++) {
    const float gradient = value_of(dout[c]);
    const float distance = distance_of(value_of(x[c]), of);
    dx[c] = rounded_to<X>((gradient * scale[c] - level - distance * along) * of.inverse);
    if constexpr (kSums) {
      dscale[c] += gradient * (distance * of.inverse);
      dshift[c] += gradient;
    }
  }
}

// Sums of parameters' gradients belong to blocks of rows, not to threads, so the thread count
// changes no bit.
template <class X>
static void layer_norm_backward_rows(const LayerNormBackward& job) {
  const int threads = useful_threads(job.rows * job.cols, job.threads);
  const int64_t blocks = (job.rows + kNormRows - 1) / kNormRows, wide = 2 * job.cols;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      float* sums = job.sums ? job.sums + block * wide : nullptr;
      for (int64_t c = 0; sums && c < wide; c++) sums[c] = 0.f;
      const int64_t end = (block + 1) * kNormRows < job.rows ? (block + 1) * kNormRows : job.rows;
      for (int64_t row = block * kNormRows; row < end; row++)
        sums ? layer_norm_backward_row<X, true>(job, row, sums, sums + job.cols)
             : layer_norm_backward_row<X, false>(job, row, nullptr, nullptr);
    }
    if (job.sums) add_blocks(job.sums, blocks, wide, job.dparameters);
  }
}

static void layer_norm_backward(const LayerNormBackward& job) {
  job.x.bf16 ? layer_norm_backward_rows<uint16_t>(job) : layer_norm_backward_rows<float>(job);
}
