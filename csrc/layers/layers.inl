// Norms, gated activations and rotary positions. Included inside a level's namespace, after numbers.inl.

static const int kNormLanes = 32;            // partial sums of a row, added in order
static const int64_t kLayerPiece = 1 << 12;  // elements that a thread takes at a time
static const int64_t kRopeTokens = 16;       // whose cosines stay in L1 while all heads are turned
static const int64_t kWorthAThread =
    1 << 14;  // elements below which waking a thread takes longer than the work

static inline int useful_threads(int64_t elements, int threads) {
  return elements < 2 * kWorthAThread ? 1 : threads;
}

template <class T>
static inline T* row_of(const LayerMatrix& m, int64_t row) {
  return static_cast<T*>(m.data) + row * m.stride;
}

static inline float sum_of_lanes(const float* lanes) {
  float sum = 0.f;
  for (int j = 0; j < kNormLanes; j++) sum += lanes[j];
  return sum;
}

struct NoResidual {};

// One row: total = x + residual rounded to S, what is normed; or x itself, then of type S.
template <class X, class R, class S, class O, bool kRoundFirst>
static inline void norm_row(const NormJob& job, int64_t row) {
  const int64_t cols = job.cols;  // not read again after each store
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

// Blocks of rows, not shares of threads, so that no thread count changes a bit.
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
#pragma omp for schedule(static)
    for (int64_t first = 0; first < (job.sums ? job.cols : 0); first += 64) {
      const int64_t cols = job.cols - first < 64 ? job.cols - first : 64;
      double total[64] = {};
      for (int64_t block = 0; block < blocks; block++)
        for (int64_t c = 0; c < cols; c++)
          total[c] += double(job.sums[block * job.cols + first + c]);
      for (int64_t c = 0; c < cols; c++) job.dscale[first + c] = float(total[c]);
    }
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

// erf within a unit in the last place (after Norbert Juffa's polynomials).
static inline float erf_of(float x) {
  const float size = std::fabs(x);
  const float t = size > 10.f ? 10.f : size;  // NaN passes
  const float s = x * x;
  float far =
      (-1.72853470e-5f * t + 3.83197126e-4f) * (t * t) + (-3.88396438e-3f * t + 2.42546219e-2f);
  far = far * t + -1.06777877e-1f;
  far = far * t + -6.34846687e-1f;
  far = far * t + -1.28717512e-1f;
  far = 1.f - exp_of(far * t - t);
  float near = -5.96761703e-4f;
  near = near * s + 4.99119423e-3f;
  near = near * s + -2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s + -3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * x + x;
  return size > 0.927734375f ? (x < 0.f ? -far : far) : near;
}

struct ExpBounds {
  float low, high;
};

// Variables: of constants the compiler makes a branch each, with a division of its own.
ExpBounds exp_bounds = {-86.9f, 88.8f};

// 1 + e^x as with exp_of, without its care below -86.9, where nothing is left of it; infinity from 88.73 on.
static inline float one_plus_exp(float x, ExpBounds bounds) {
  const float above = x < bounds.low ? bounds.low : x;  // NaN passes
  const float inside = above > bounds.high ? bounds.high : above;
  const float shifted = inside * 1.44269504f + 12582912.f;
  const float n = shifted - 12582912.f;
  const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  const float square = r * r;
  float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  float q = 8.3334519073e-3f * r + 4.1665795894e-2f;
  p = p * square + q;
  q = 1.6666665459e-1f * r + 5.0000001201e-1f;
  p = (p * square + q) * square + r + 1.f;
  const float half_power =
      as_float((as_bits(shifted) + 126u) << 23);  // 2^(n - 1), since 2^128 is no float
  return p * half_power * 2.f + 1.f;
}

// The activation: x times a share of it.
template <Activation kind>
static inline float activation_of(float x, ExpBounds bounds) {
  if constexpr (kind == Activation::GELU) return x * (0.5f * (1.f + erf_of(x * 0.70710678f)));
  if constexpr (kind == Activation::GELU_TANH)
    return x / one_plus_exp(x * (-1.59576912f - 0.07135482f * (x * x)), bounds);
  return x / one_plus_exp(-x, bounds);
}

struct Slope {
  float value, slope;
};

// The same with the derivative.
template <Activation kind>
static inline Slope slope_of(float x, ExpBounds bounds) {
  if constexpr (kind == Activation::GELU) {
    const float share = 0.5f * (1.f + erf_of(x * 0.70710678f));
    return {x * share, share + x * 0.39894228f * exp_of(-0.5f * x * x)};
  } else {
    constexpr bool cubic = kind == Activation::GELU_TANH;
    const float share =
        1.f / one_plus_exp(cubic ? x * (-1.59576912f - 0.07135482f * (x * x)) : -x, bounds);
    const float value = x * share;
    const float steep = cubic ? 1.59576912f + 0.21406445f * (x * x) : 1.f;
    return {value, share + value * (1.f - share) * steep};
  }
}

template <Activation kind, class T>
static inline void gated_piece(const GatedJob& job, int64_t row, int64_t first, int64_t cols) {
  const T* __restrict gate = row_of<T>(job.gate, row) + first;
  const T* __restrict up = row_of<T>(job.up, row) + first;
  const ExpBounds bounds = exp_bounds;
  if (!job.dout.data) {
    T* __restrict out = row_of<T>(job.out, row) + first;
    for (int64_t c = 0; c < cols; c++)
      out[c] = rounded_to<T>(activation_of<kind>(value_of(gate[c]), bounds) * value_of(up[c]));
    return;
  }
  const T* __restrict dout = row_of<T>(job.dout, row) + first;
  T* __restrict dgate = row_of<T>(job.dgate, row) + first;
  T* __restrict dup = row_of<T>(job.dup, row) + first;
  for (int64_t c = 0; c < cols; c++) {
    const Slope a = slope_of<kind>(value_of(gate[c]), bounds);
    const float gradient = value_of(dout[c]);
    dgate[c] = rounded_to<T>(gradient * value_of(up[c]) * a.slope);
    dup[c] = rounded_to<T>(gradient * a.value);
  }
}

template <Activation kind>
static void gated_of(const GatedJob& job) {
  const int threads = useful_threads(job.rows * job.cols, job.threads);
  const int64_t across = (job.cols + kLayerPiece - 1) / kLayerPiece;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t piece = 0; piece < job.rows * across; piece++) {
    const int64_t row = piece / across, first = piece % across * kLayerPiece;
    const int64_t cols = job.cols - first < kLayerPiece ? job.cols - first : kLayerPiece;
    job.gate.bf16 ? gated_piece<kind, uint16_t>(job, row, first, cols)
                  : gated_piece<kind, float>(job, row, first, cols);
  }
}

static void gated(const GatedJob& job) {
  if (job.activation == Activation::SILU) return gated_of<Activation::SILU>(job);
  job.activation == Activation::GELU ? gated_of<Activation::GELU>(job)
                                     : gated_of<Activation::GELU_TANH>(job);
}

template <class T>
static inline T* head_of(const RopeHeads& x, int64_t b, int64_t head, int64_t token) {
  return static_cast<T*>(x.data) + b * x.batch_stride + head * x.head_stride +
         token * x.token_stride;
}

// in: one head of one token. Backward is the transposed rotation, also where the halves of cos and sin differ.
template <class I, class C, class O>
static inline void rotate(const RopeJob& job, const I* __restrict in, const C* __restrict cos,
                          const C* __restrict sin, O* __restrict out) {
  const int64_t half = job.rotary / 2, rotary = job.rotary, width = job.width;
  const C *low = job.backward ? sin + half : sin, *high = job.backward ? sin : sin + half;
  const float sign = job.backward ? -1.f : 1.f;  // exact
  for (int64_t j = 0; j < half; j++) {
    const float a = value_of(in[j]), b = value_of(in[half + j]);
    out[j] = rounded_to<O>(a * value_of(cos[j]) - b * (sign * value_of(low[j])));
    out[half + j] = rounded_to<O>(b * value_of(cos[half + j]) + a * (sign * value_of(high[j])));
  }
  for (int64_t j = rotary; j < width; j++) out[j] = rounded_to<O>(value_of(in[j]));
}

// In the order in which the results lie in memory.
template <class I, class C, class O>
static inline void rotate_heads(const RopeJob& job, const RopeHeads& in, const RopeHeads& out,
                                int64_t b, int64_t first, int64_t last) {
  const auto one = [&](int64_t head, int64_t token) {
    rotate<I, C, O>(job, head_of<I>(in, b, head, token), head_of<C>(job.cos, b, 0, token),
                    head_of<C>(job.sin, b, 0, token), head_of<O>(out, b, head, token));
  };
  if (out.head_stride < out.token_stride) {
    for (int64_t token = first; token < last; token++)
      for (int64_t head = 0; head < in.heads; head++) one(head, token);
  } else {
    for (int64_t head = 0; head < in.heads; head++)
      for (int64_t token = first; token < last; token++) one(head, token);
  }
}

template <class I, class C, class O>
static void rope_of(const RopeJob& job) {
  const int64_t pieces = (job.tokens + kRopeTokens - 1) / kRopeTokens;
  const int64_t elements = job.batch * job.tokens * job.width * (job.in[0].heads + job.in[1].heads);
#pragma omp parallel for schedule(static) num_threads(useful_threads(elements, job.threads))
  for (int64_t piece = 0; piece < job.batch * pieces; piece++) {
    const int64_t first = piece % pieces * kRopeTokens;
    const int64_t last = first + kRopeTokens < job.tokens ? first + kRopeTokens : job.tokens;
    for (int i = 0; i < 2; i++)
      rotate_heads<I, C, O>(job, job.in[i], job.out[i], piece / pieces, first, last);
  }
}

static void rope(const RopeJob& job) {
  using half = uint16_t;
  if (!job.in[0].bf16 && !job.out[0].bf16)
    return job.cos.bf16 ? rope_of<float, half, float>(job) : rope_of<float, float, float>(job);
  if (!job.in[0].bf16)
    return rope_of<float, float, half>(job);  // the gradient of bf16 turned by float cosines
  if (!job.out[0].bf16) return rope_of<half, float, float>(job);
  rope_of<half, half, half>(job);
}

const LayerKernels layer_kernels = {norm, norm_backward, gated, rope};
