// RMSNorm, forward and backward.

static const int kNormLanes = 32;  // partial sums of a row, added in pairs

template <int width = kNormLanes / 2>
static inline float sum_of_lanes(float* lanes) {
  for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
  if constexpr (width > 1) sum_of_lanes<width / 2>(lanes);
  return lanes[0];
}

struct NoResidual {};

// Norms one row of x; with a residual, of total = x + residual. S is the type of the row that is
// normed.
template <class X, class R, class S, class O, bool kRoundFirst>
static inline void norm_row(const NormJob& job, int64_t row) {
  const int64_t cols = job.cols;  // a local, so that no store makes the compiler read it again
  constexpr bool adds = !std::is_same<R, NoResidual>::value;
  const X* __restrict x = row_of<X>(job.x, row);
  float lanes[kNormLanes] = {};
  const S* __restrict normed;
  if constexpr (adds) {
    const R* __restrict residual = row_of<R>(job.residual, row);
    S* __restrict total = row_of<S>(job.total, row);
    const auto add = [&](int64_t c) {
      const S sum = rounded_to<S>(value_of(residual[c]) + value_of(x[c]));
      total[c] = sum;
      return value_of(sum) * value_of(sum);
    };
    int64_t c = 0;
    for (; c + kNormLanes <= cols; c += kNormLanes)
      for (int j = 0; j < kNormLanes; j++) lanes[j] += add(c + j);
    for (int j = 0; c < cols; c++, j++) lanes[j] += add(c);
    normed = total;
  } else {
    int64_t c = 0;
    for (; c + kNormLanes <= cols; c += kNormLanes)
      for (int j = 0; j < kNormLanes; j++) lanes[j] += value_of(x[c + j]) * value_of(x[c + j]);
    for (int j = 0; c < cols; c++, j++) lanes[j] += value_of(x[c]) * value_of(x[c]);
    normed = x;
  }
  const float inverse = 1.f / std::sqrt(sum_of_lanes(lanes) / float(cols) + job.epsilon);
  const float* __restrict scale = job.scale;
  O* __restrict out = row_of<O>(job.out, row);
  for (int64_t c = 0; c < cols; c++) {
    const float y = value_of(normed[c]) * inverse;
    out[c] = rounded_to<O>((kRoundFirst ? value_of(rounded_to<S>(y)) : y) * scale[c]);
  }
}

template <class X, class R, class S, class O>
static void norm_rows(const NormJob& job) {
  const int threads = useful_threads(job.rows * job.cols, job.threads);
  const bool round_first = job.round_first && sizeof(S) == 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < job.rows; row++)
    round_first ? norm_row<X, R, S, O, true>(job, row) : norm_row<X, R, S, O, false>(job, row);
}

static void norm(const NormJob& job) {
  using half = uint16_t;
  if (!job.residual.data) {
    if (!job.x.bf16) return norm_rows<float, NoResidual, float, float>(job);
    return job.out.bf16 ? norm_rows<half, NoResidual, half, half>(job)
                        : norm_rows<half, NoResidual, half, float>(job);
  }
  if (job.x.bf16 && job.residual.bf16)
    return job.out.bf16 ? norm_rows<half, half, half, half>(job)
                        : norm_rows<half, half, half, float>(job);
  if (job.x.bf16) return norm_rows<half, float, float, float>(job);
  job.residual.bf16 ? norm_rows<float, half, float, float>(job)
                    : norm_rows<float, float, float, float>(job);
}

// dx = (g - x * mean(g * x) / mean square) / RMS with g = dout * scale; sums += dout * x / RMS.
template <class G, class X, bool kTotal>
static inline void norm_backward_row(const NormBackward& job, int64_t row, float* __restrict sums) {
  const int64_t cols = job.cols;
  const G* __restrict dout = row_of<G>(job.dout, row);
  const X* __restrict x = row_of<X>(job.x, row);
  const X* __restrict dtotal = kTotal ? row_of<X>(job.dtotal, row) : nullptr;
  const float* __restrict scale = job.scale;
  X* __restrict dx = row_of<X>(job.dx, row);
  float squares[kNormLanes] = {}, products[kNormLanes] = {};
  int64_t c = 0;
  for (; c + kNormLanes <= cols; c += kNormLanes)
    for (int j = 0; j < kNormLanes; j++) {
      const float value = value_of(x[c + j]);
      squares[j] += value * value;
      products[j] += value_of(dout[c + j]) * scale[c + j] * value;
    }
  for (int j = 0; c < cols; c++, j++) {
    const float value = value_of(x[c]);
    squares[j] += value * value;
    products[j] += value_of(dout[c]) * scale[c] * value;
  }
  const float inverse = 1.f / std::sqrt(sum_of_lanes(squares) / float(cols) + job.epsilon);
  const float along = sum_of_lanes(products) * inverse / float(cols) * inverse;
  for (c = 0; c < cols; c++) {
    const float gradient = (value_of(dout[c]) * scale[c] - value_of(x[c]) * along) * inverse;
    if constexpr (kTotal)
      dx[c] = rounded_to<X>(value_of(dtotal[c]) + gradient);
    else
      dx[c] = rounded_to<X>(gradient);
  }
  if (sums)
    for (c = 0; c < cols; c++) sums[c] += value_of(dout[c]) * (value_of(x[c]) * inverse);
}

// Adds the rows of sums [blocks, cols] in double. All threads of a parallel region call it.
static inline void add_blocks(const float* sums, int64_t blocks, int64_t cols, float* out) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < cols; first += 64) {
    const int64_t count = cols - first < 64 ? cols - first : 64;
    double total[64] = {};
    for (int64_t block = 0; block < blocks; block++)
      for (int64_t c = 0; c < count; c++) total[c] += double(sums[block * cols + first + c]);
    for (int64_t c = 0; c < count; c++) out[first + c] = float(total[c]);
  }
}

// Sums of the scale's gradient belong to blocks of rows, not to threads, so the thread count
// changes no bit.
template <class G, class X, bool kTotal>
static void norm_backward_rows(const NormBackward& job) {
  const int threads = useful_threads(job.rows * job.cols, job.threads);
  const int64_t blocks = (job.rows + kNormRows - 1) / kNormRows;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      float* sums = job.sums ? job.sums + block * job.cols : nullptr;
      for (int64_t c = 0; sums && c < job.cols; c++) sums[c] = 0.f;
      const int64_t end = (block + 1) * kNormRows < job.rows ? (block + 1) * kNormRows : job.rows;
      for (int64_t row = block * kNormRows; row < end; row++)
        norm_backward_row<G, X, kTotal>(job, row, sums);
    }
    if (job.sums) add_blocks(job.sums, blocks, job.cols, job.dscale);
  }
}

template <class G, class X>
static void norm_backward_of(const NormBackward& job) {
  job.dtotal.data ? norm_backward_rows<G, X, true>(job) : norm_backward_rows<G, X, false>(job);
}

static void norm_backward(const NormBackward& job) {
  if (!job.x.bf16) return norm_backward_of<float, float>(job);
  job.dout.bf16 ? norm_backward_of<uint16_t, uint16_t>(job)
                : norm_backward_of<float, uint16_t>(job);
}
