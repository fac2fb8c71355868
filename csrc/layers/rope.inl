// Rotary positions, forward and backward.

// Tokens whose cosines stay in L1 while all heads are rotated.
static const int64_t kRopeTokens = 16;

template <class T>
static inline T* head_of(const RopeHeads& x, int64_t b, int64_t head, int64_t token) {
  return static_cast<T*>(x.data) + b * x.batch_stride + head * x.head_stride +
         token * x.token_stride;
}

// Rotates one head of one token. Backward is the transposed rotation, also if cos and sin of
// partners differ.
template <class I, class C, class O, bool kNeighbours>
static inline void rotate(const RopeJob& job, const I* __restrict in, const C* __restrict cos,
                          const C* __restrict sin, O* __restrict out) {
  const int64_t half = job.rotary / 2, rotary = job.rotary, width = job.width;
  const int64_t step = kNeighbours ? 2 : 1, away = kNeighbours ? 1 : half;
  const C *low = job.backward ? sin + away : sin, *high = job.backward ? sin : sin + away;
  const float sign = job.backward ? -1.f : 1.f;  // exact
  for (int64_t j = 0; j < half; j++) {
    const int64_t i = j * step;
    const float a = value_of(in[i]), b = value_of(in[away + i]);
    out[i] = rounded_to<O>(a * value_of(cos[i]) - b * (sign * value_of(low[i])));
    out[away + i] = rounded_to<O>(b * value_of(cos[away + i]) + a * (sign * value_of(high[i])));
  }
  for (int64_t j = rotary; j < width; j++) out[j] = rounded_to<O>(value_of(in[j]));
}

// Takes heads and tokens in the order in which the results lie in memory.
template <class I, class C, class O>
static inline void rotate_heads(const RopeJob& job, const RopeHeads& in, const RopeHeads& out,
                                int64_t b, int64_t first, int64_t last) {
  const auto rotate_head = [&](int64_t head, int64_t token) {
    const I* from = head_of<I>(in, b, head, token);
    const C* cos = head_of<C>(job.cos, b, 0, token);
    const C* sin = head_of<C>(job.sin, b, 0, token);
    O* to = head_of<O>(out, b, head, token);
    job.interleaved ? rotate<I, C, O, true>(job, from, cos, sin, to)
                    : rotate<I, C, O, false>(job, from, cos, sin, to);
  };
  if (out.head_stride < out.token_stride) {
    for (int64_t token = first; token < last; token++)
      for (int64_t head = 0; head < in.heads; head++) rotate_head(head, token);
  } else {
    for (int64_t head = 0; head < in.heads; head++)
      for (int64_t token = first; token < last; token++) rotate_head(head, token);
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
    return rope_of<float, float, half>(job);  // gradient of bf16 that float cosines rotated
  if (!job.out[0].bf16) return rope_of<half, float, float>(job);
  rope_of<half, half, half>(job);
}
