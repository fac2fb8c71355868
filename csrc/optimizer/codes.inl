// 8-bit codes of moments, in blocks of 256 with one scale.

// Codes and scales of a block's moments.
struct CodedMoments {
  int8_t* m;
  uint8_t* v;
  float *m_scale, *v_scale;
};

// First moments are sign * (code / 127)^2 * scale: squares of the code times this.
static inline float first_unit(float scale) { return std::sqrt(scale) / 127.f; }
// Second ones are (code / 255)^4 * scale: squares of the code's square times this.
static inline float second_unit(float scale) { return std::sqrt(scale) / 65025.f; }

static inline float decoded_first(int8_t code, float unit) {
  const float root = float(int32_t(code)) * unit;
  return root * std::fabs(root);
}

static inline float decoded_second(uint8_t code, float unit) {
  const float square = float(int32_t(code)) * float(int32_t(code)) * unit;
  return square * square;
}

// A code's rounding, from random bits: an odd multiple of 2^-17 between -1/2 and 1/2.
static inline float shift_of(uint32_t draw) {
  return float(int32_t((draw & 0xffff0000u) | 0x8000u)) * 0x1p-32f;
}

// Returns the nearest whole number of a value between 0 and 2^22, of two the even one.
static inline int32_t nearest_whole(float value) {
  return int32_t(as_bits(value + 12582912.f) & 0x3fffffu);
}

// Returns the code of a value in units of the smallest code's. The value lies above
// k^2 + u (2k + 1) exactly if k + 1 is the code, for u = 1/2 - shift: rounding is unbiased in the
// value.
static inline int32_t first_code(float scaled, float shift) {
  const float square = scaled + (shift * shift - 0.25f);
  return nearest_whole(std::sqrt(square > 0.f ? square : 0.f) + shift);
}

// The same for fourth powers, from the value's square root. The mean over all shifts is off by less
// than 0.1 / code^2 of the step to the next code.
static inline int32_t second_code(float scaled_root, float shift) {
  const float square = scaled_root + 3.f * (shift * shift - 0.25f);
  return nearest_whole(std::sqrt(square > 0.f ? square : 0.f) + shift);
}

// A block's moments on their way to codes: first ones, square roots of second ones, random bits.
struct BlockValues {
  float *m, *roots;
  uint32_t* draws;
};

// What turns a block's moments into codes.
struct Factors {
  float first, second;
};

// Codes of a block. The factors scale its largest moments to the squares of their codes. A second
// moment above zero keeps a code above zero, since a zero would divide the step by epsilon only.
template <bool Stochastic>
static void encode_block(const BlockValues& x, const Factors& factors, const CodedMoments& to,
                         int n) {
  alignas(64) int32_t first[kMomentBlock], second[kMomentBlock];
  const float* const __restrict m = x.m, * const __restrict roots = x.roots;
  const uint32_t* const __restrict draws = x.draws;
  for (int i = 0; i < n; i++) {
    const float shift = Stochastic ? shift_of(draws[i]) : 0.f;
    const float size = as_float(as_bits(m[i]) & 0x7fffffffu);
    const int32_t code = first_code(size * factors.first, shift);
    const int32_t inside = code < 127 ? code : 127;
    first[i] = m[i] < 0.f ? -inside : inside;
    const int32_t above = second_code(roots[i] * factors.second, shift);
    const int32_t some = above > 0 ? above : int32_t(roots[i] > 0.f);
    second[i] = some < 255 ? some : 255;
  }
  for (int i = 0; i < n; i++) to.m[i] = int8_t(first[i]);
  for (int i = 0; i < n; i++) to.v[i] = uint8_t(second[i]);
}

static inline bool has_codes(float top) { return top >= 1.17549435e-38f && top <= 3.40282347e38f; }

// Writes the scale of a block's moments, and their codes if all are zero or one is not finite.
template <class Code>
static void finish_block(float top, int most, Code* codes, float* scale, int n) {
  *scale = has_codes(top) || !(top < 1.f) ? top : 0.f;
  if (!has_codes(top)) std::memset(codes, top < 1.f ? 0 : most, size_t(n));
}

static inline bool needs_lift(float m_top) { return has_codes(m_top) && m_top < 0x1p-80f; }

// Multiplies a block's first moments by 2^64 if their factor could be infinite.
static inline Factors factors_of(const BlockValues& x, float m_top, float v_top, int n) {
  float top = m_top;
  if (needs_lift(m_top)) {
    top *= 0x1p64f;
    for (int i = 0; i < n; i++) x.m[i] *= 0x1p64f;
  }
  return {has_codes(m_top) ? 16129.f / top : 0.f,
          has_codes(v_top) ? 65025.f / std::sqrt(v_top) : 0.f};
}
