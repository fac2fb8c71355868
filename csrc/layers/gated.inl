// Gated activations, forward and backward.

// Elements that a thread takes at a time.
static const int64_t kLayerPiece = 1 << 12;

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

// A variable, since constants make the compiler emit a branch for each bound, with its own
// division.
ExpBounds exp_bounds = {-86.9f, 88.8f};

// 1 + e^x, by the polynomial of exp_of; 1 below -86.9 to the last bit, infinity from 88.73 up.
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

// Returns the activation of x: x times a share.
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

// Returns the activation of x and its derivative.
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
