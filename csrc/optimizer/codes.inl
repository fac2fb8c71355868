// 8-bit codes of moments, in blocks of 256 with one scale.

// Returns the scale of up to 256 moments: their largest size, or NaN if one of them is NaN.
static inline float largest_size(const float* x, int n) {
  int32_t top = 0;
  for (int i = 0; i < n; i++) {
    const int32_t size = int32_t(as_bits(x[i]) & 0x7fffffffu);
    top = size > top ? size : top;
  }
  return as_float(uint32_t(top));
}

// Codes of moments that ``factor`` scales to their codes' powers, in one loop. ``roots`` are square
// roots of x, and ``root_factor`` scales them to squares of codes.
template <bool Second, bool Stochastic, class Code>
static void encode_scaled(const float* __restrict x, const float* __restrict roots, float factor,
                          float root_factor, Code* __restrict codes, int n,
                          const uint32_t* __restrict draws) {
  const float steps = Second ? 255.f : 127.f;
  alignas(64) int32_t wide[kMomentBlock];
  for (int i = 0; i < n; i++) {
    const float scaled = as_float(as_bits(x[i]) & 0x7fffffffu) * factor;
    const float root = std::sqrt(Second ? roots[i] * root_factor : scaled);
    const int32_t whole = int32_t(root < steps - 1.f ? root : steps - 1.f);
    const float low = float(whole);
    const float high = low + 1.f;
    const float below = Second ? (low * low) * (low * low) : low * low;
    const float gap = Second ? (high * high) * (high * high) - below : low + high;
    uint32_t draw = 0x8000u;
    if constexpr (Stochastic) draw = Second ? draws[i] & 0xffffu : draws[i] >> 16;
    int32_t code = whole + int32_t(float(int32_t(draw)) * (gap * 0x1p-16f) < scaled - below);
    if constexpr (Second)
      code = code > 0 ? code : int32_t(scaled > 0.f);
    else
      code = x[i] < 0.f ? -code : code;
    wide[i] = code;
  }
  for (int i = 0; i < n; i++) codes[i] = Code(wide[i]);
}

// Codes of a block whose largest size is ``top``.
template <bool Second, bool Stochastic, class Code>
static void encode_block(const float* x, const float* roots, float top, Code* codes, int n,
                         const uint32_t* draws) {
  const float steps = Second ? 255.f : 127.f;
  const float most = Second ? steps * steps * steps * steps : steps * steps;
  const float root_factor = steps * steps / std::sqrt(top);
  int done = 0;
  alignas(64) float lifted[kMomentBlock];
  if (top < 0x1p-80f) {  // most / top would be infinite
    top *= 0x1p64f;
    for (int i = 0; i < n; i++) lifted[i] = x[i] * 0x1p64f;
    x = lifted;
#if MERIT_AVX512
  } else {
    done = encode_lanes<Second, Stochastic>(x, roots, most / top, root_factor, codes, n, draws);
#endif
  }
  encode_scaled<Second, Stochastic>(x + done, roots + done, most / top, root_factor, codes + done,
                                    n - done, draws + done);
}

// First moments are sign * (code / 127)^2 * scale, second ones (code / 255)^4 * scale. Rounding
// with random bits is unbiased in the value; without them it is to nearest. A second moment above
// zero keeps a code above zero, since a zero would divide the step by epsilon only.
template <bool Second, bool Stochastic, class Code>
static void encode(const float* x, const float* roots, float top, Code* codes, float* scale, int n,
                   const uint32_t* draws) {
  *scale = top;
  if (top >= 1.17549435e-38f && top <= 3.40282347e38f)
    return encode_block<Second, Stochastic>(x, roots, top, codes, n, draws);
  // All are zero, or one is not finite.
  const float steps = Second ? 255.f : 127.f;
  for (int i = 0; i < n; i++) codes[i] = Code(top > 1.f || top != top ? steps : 0.f);
  if (top < 1.f) *scale = 0.f;
}

template <bool Second, class Code>
static void decode(const Code* __restrict codes, float scale, float* __restrict x, int n) {
  for (int i = 0; i < n; i++) {
    const float code = float(int32_t(codes[i]));
    if constexpr (Second)
      x[i] = (code * code) * (code * code) * float(1.0 / (255.0 * 255.0 * 255.0 * 255.0)) * scale;
    else
      x[i] = code * std::fabs(code) * float(1.0 / (127.0 * 127.0)) * scale;
  }
}
