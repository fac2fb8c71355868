// Functions of logits, which vectorize.

// tanh within 2 units in the last place (Cephes' polynomial near 0).
static inline float tanh_of(float x) {
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  const float size = x < 0.f ? -x : x;
  const float far = 1.f - 2.f / (exp_of(size + size) + 1.f);
  return size < 0.625f ? near : x < 0.f ? -far : far;
}

// The derivative of tanh, with full precision also where tanh is 1.
static inline float tanh_slope(float x) {
  const float decay = exp_of(-2.f * (x < 0.f ? -x : x));
  return 4.f * decay / ((1.f + decay) * (1.f + decay));
}

// Where e^x is 0, x is finite: their product is 0 also for a logit of -infinity.
static inline float exponent_of(float x) { return x < -128.f ? -128.f : x; }
