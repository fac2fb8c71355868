// 8-bit codes of moments, in blocks of 256 with one scale.

static void take_roots(float* __restrict x, int n) {
  for (int i = 0; i < n; i++) x[i] = std::sqrt(x[i]);
}

// Returns the scale of up to 256 moments: their largest size, or NaN if one of them is NaN.
static inline float largest_size(const float* x, int n) {
  int32_t top = 0;
  for (int i = 0; i < n; i++) {
    const int32_t size = int32_t(as_bits(x[i]) & 0x7fffffffu);
    top = size > top ? size : top;
  }
  return as_float(uint32_t(top));
}

// First moments are sign * (code / 127)^2 * scale, second ones (code / 255)^4 * scale. Rounding
// with random bits is unbiased in the value; without them it is to nearest. A second moment above
// zero keeps a code above zero, since a zero would divide the step by epsilon only.
template <bool Second, class Code>
static void encode(const float* x, Code* codes, float* scale, int n, const uint32_t* random) {
  const float steps = Second ? 255.f : 127.f,
              most = Second ? steps * steps * steps * steps : steps * steps;
  const float top = largest_size(x, n);
  *scale = top;
  if (!(top >= 1.17549435e-38f && top <= 3.40282347e38f)) {  // all are zero, or one is not finite
    for (int i = 0; i < n; i++) codes[i] = Code(top > 1.f || top != top ? steps : 0.f);
    if (top < 1.f) *scale = 0.f;
    return;
  }
  const float inverse = 1.f / top;
  float scaled[kMomentBlock], root[kMomentBlock];
  for (int i = 0; i < n; i++) {
    const float size = as_float(as_bits(x[i]) & 0x7fffffffu);
    scaled[i] = root[i] = size * inverse * most;
  }
  take_roots(root, n);
  if constexpr (Second) take_roots(root, n);
  for (int i = 0; i < n; i++) {
    const uint32_t bits = ((random ? random[i] : 0x80008000u) >> (Second ? 0 : 16)) & 0xffffu;
    const float share = float(int32_t(bits)) * (1.f / 65536.f);
    const int32_t whole = int32_t(root[i] < steps - 1.f ? root[i] : steps - 1.f);
    const float low = float(whole), high = low + 1.f;
    const float below = Second ? (low * low) * (low * low) : low * low;
    const float above = Second ? (high * high) * (high * high) : high * high;
    int32_t code = whole + int32_t(share * (above - below) < scaled[i] - below);
    if constexpr (Second)
      code += int32_t(code == 0) & int32_t(scaled[i] > 0.f);
    else
      code = x[i] < 0.f ? -code : code;
    codes[i] = Code(code);
  }
}

template <bool Second, class Code>
static void decode(const Code* codes, float scale, float* x, int n) {
  for (int i = 0; i < n; i++) {
    const float code = float(int32_t(codes[i]));
    if constexpr (Second)
      x[i] = (code * code) * (code * code) * float(1.0 / (255.0 * 255.0 * 255.0 * 255.0)) * scale;
    else
      x[i] = code * std::fabs(code) * float(1.0 / (127.0 * 127.0)) * scale;
  }
}
