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

// Variables, since constants make the compiler emit a branch for each bound, with its own
// division.
ExpBounds exp_bounds = {-86.9f, 89.3f};
ExpBounds power_bounds = {-126.f, 129.f};

// 2^(n - 1) of shifted = n + 12582912.
static inline float power_below(float shifted) { return as_float((as_bits(shifted) + 126u) << 23); }

static inline float inside_of(float x, ExpBounds bounds) {
  const float above = x < bounds.low ? bounds.low : x;  // NaN passes
  return above > bounds.high ? bounds.high : above;
}

// (e^x + 1) / 2, so that no finite e^x overflows; infinity from 89.07 up, 1 / 2 below -86.9.
// e^x is within 2 units in the last place.
static inline float half_of_one_plus_exp(float x) {
  const float inside = inside_of(x, exp_bounds);
  const float shifted = inside * 1.44269504f + 12582912.f;
  const float n = shifted - 12582912.f;
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, inside));
  float p = fused(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.f;
  return fused(p, power_below(shifted), 0.5f);
}

// Coefficients of 2^r for |r| <= 1/2 within 2^-18: for bf16, which rounds at 2^-9.
static const float kPowerOfTwo[] = {9.58284786e-3f, 5.59064326e-2f, 2.40240988e-1f, 6.93124192e-1f};

// 1 + 2^x; infinity from 129 up, 1 below -126.
static inline float one_plus_power(float x) {
  const float inside = inside_of(x, power_bounds);
  const float shifted = inside + 12582912.f;
  const float r = inside - (shifted - 12582912.f);
  float p = fused(kPowerOfTwo[0], r, kPowerOfTwo[1]);
  p = fused(p, r, kPowerOfTwo[2]);
  p = fused(p, r, kPowerOfTwo[3]);
  p = fused(p, r, 1.f);
  return fused(p * power_below(shifted), 2.f, 1.f);
}

// The activation of x is x / (1 + e^y), or x / (1 + 2^z).
template <Activation kind>
static inline float exponent_of(float x) {
  return kind == Activation::GELU_TANH ? x * (-1.59576912f - 0.07135482f * (x * x)) : -x;
}

template <Activation kind>
static inline float power_of(float x) {
  return x * (kind == Activation::GELU_TANH ? -2.30220818f - 0.102943240f * (x * x) : -1.44269504f);
}

// Returns the activation of x.
template <Activation kind, class T>
static inline float activation_of(float x) {
  if constexpr (kind == Activation::GELU) return x * (0.5f * (1.f + erf_of(x * 0.70710678f)));
  if constexpr (sizeof(T) == 2) return x / one_plus_power(power_of<kind>(x));
  return 0.5f * x / half_of_one_plus_exp(exponent_of<kind>(x));
}

struct Slope {
  float value, slope;
};

// Returns the activation of x and its derivative.
template <Activation kind, class T>
static inline Slope slope_of(float x) {
  if constexpr (kind == Activation::GELU) {
    const float share = 0.5f * (1.f + erf_of(x * 0.70710678f));
    return {x * share, share + x * 0.39894228f * exp_of(-0.5f * x * x)};
  } else {
    const float share = sizeof(T) == 2 ? 1.f / one_plus_power(power_of<kind>(x))
                                       : 0.5f / half_of_one_plus_exp(exponent_of<kind>(x));
    const float value = x * share;
    if constexpr (kind == Activation::SILU) return {value, fused(value, 1.f - share, share)};
    const float steep = 1.59576912f + 0.21406445f * (x * x);
    return {value, fused(value * (1.f - share), steep, share)};
  }
}

#if MERIT_AVX512_BF16
#include "layers/gated_lanes.inl"
#endif

// Floats that a loop makes and another rounds: the compiler vectorizes each better than both.
static const int64_t kGatedRun = 512;

template <class T>
static inline float* floats_of(T* out, float* buffer) {
  if constexpr (sizeof(T) == 4)
    return out;
  else
    return buffer;
}

template <class T>
static inline void store_rounded(const float* __restrict values, T* __restrict out, int64_t count) {
  if constexpr (sizeof(T) == 2) round_to_bf16(values, out, count);
}

template <Activation kind, class T>
static inline void gated_run(const T* __restrict gate, const T* __restrict up, T* __restrict out,
                             int64_t cols) {
  int64_t c = 0;
#if MERIT_AVX512_BF16
  if constexpr (in_lanes<kind, T>) c = gated_lanes<kind>(gate, up, out, cols);
#endif
  alignas(64) float buffer[kGatedRun];
  float* __restrict values = floats_of(out, buffer);
  const int64_t done = c;
  for (; c < cols; c++) values[c] = activation_of<kind, T>(value_of(gate[c])) * value_of(up[c]);
  store_rounded(values + done, out + done, cols - done);
}

template <Activation kind, class T>
static inline void gated_backward_run(const T* __restrict dout, const T* __restrict gate,
                                      const T* __restrict up, T* __restrict dgate,
                                      T* __restrict dup, int64_t cols) {
  int64_t c = 0;
#if MERIT_AVX512_BF16
  if constexpr (in_lanes<kind, T>) c = gated_backward_lanes<kind>(dout, gate, up, dgate, dup, cols);
#endif
  alignas(64) float gate_buffer[kGatedRun], up_buffer[kGatedRun];
  float* __restrict gate_values = floats_of(dgate, gate_buffer);
  float* __restrict up_values = floats_of(dup, up_buffer);
  const int64_t done = c;
  for (; c < cols; c++) {
    const Slope a = slope_of<kind, T>(value_of(gate[c]));
    const float gradient = value_of(dout[c]);
    gate_values[c] = gradient * value_of(up[c]) * a.slope;
    up_values[c] = gradient * a.value;
  }
  store_rounded(gate_values + done, dgate + done, cols - done);
  store_rounded(up_values + done, dup + done, cols - done);
}

template <Activation kind, class T>
static void gated_piece(const GatedJob& job, int64_t row, int64_t first, int64_t cols) {
  const T* gate = row_of<T>(job.gate, row) + first;
  const T* up = row_of<T>(job.up, row) + first;
  for (int64_t c = 0; c < cols; c += kGatedRun) {
    const int64_t count = cols - c < kGatedRun ? cols - c : kGatedRun;
    if (!job.dout.data) {
      gated_run<kind, T>(gate + c, up + c, row_of<T>(job.out, row) + first + c, count);
      continue;
    }
    gated_backward_run<kind, T>(row_of<T>(job.dout, row) + first + c, gate + c, up + c,
                                row_of<T>(job.dgate, row) + first + c,
                                row_of<T>(job.dup, row) + first + c, count);
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
