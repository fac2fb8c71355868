// New moments after a gradient: of one element, and of a block of 8-bit ones.

struct Moved {
  float first, second;
};

// The numbers of one step of one tensor.
struct Numbers {
  uint32_t near;  // all bits: m starts from its old value, else from g: exact at both ends
  float step, clip, beta2, rest2, decay, root, epsilon, rate;

  Numbers(const AdamWJob& job, const AdamWTensor& t)
      : near(job.rest1 < 0.5f ? ~0u : 0u),
        step(near ? job.rest1 : -job.beta1),
        clip(job.clip),
        beta2(job.beta2),
        rest2(job.rest2),
        decay(job.decay),
        root(t.root),
        epsilon(job.epsilon),
        rate(t.rate) {}

  // Moments m and v after a gradient.
  Moved moved(float grad, float m, float v) const {
    const float g = grad * clip;
    const float from = as_float((as_bits(m) & near) | (as_bits(g) & ~near));
    return {from + step * (g - m), v * beta2 + rest2 * g * g};
  }
};

// Values of 8-bit moments and square roots of the second ones.
struct DecodedMoments {
  float *m, *v, *roots;
};

// Codes and scales of a block's moments.
struct CodedMoments {
  int8_t* m;
  uint8_t* v;
  float *m_scale, *v_scale;
};

#if MERIT_AVX512
static inline __m512 sixteen_of(const float* x) { return _mm512_loadu_ps(x); }
static inline __m512 sixteen_of(const uint16_t* x) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return bits_as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Returns how many elements of the block, sixteen at a time, are done. The tops are of these.
template <class Grad>
static int update_lanes(const Numbers& x, const Grad* grad, const CodedMoments& coded,
                        const DecodedMoments& out, int n, float& first_top, float& second_top) {
  const __m512i sign = _mm512_set1_epi32(int32_t(0x80000000u));
  const __m512i near = _mm512_set1_epi32(int32_t(x.near));
  const __m512 first_share = _mm512_set1_ps(float(1.0 / (127.0 * 127.0)));
  const __m512 second_share = _mm512_set1_ps(float(1.0 / (255.0 * 255.0 * 255.0 * 255.0)));
  const __m512 first_scale = _mm512_set1_ps(*coded.m_scale),
               second_scale = _mm512_set1_ps(*coded.v_scale);
  const __m512 clip = _mm512_set1_ps(x.clip), step = _mm512_set1_ps(x.step),
               beta2 = _mm512_set1_ps(x.beta2), rest2 = _mm512_set1_ps(x.rest2);
  __m512i tops[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m128i m_codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(coded.m + i));
    const __m128i v_codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(coded.v + i));
    const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(m_codes));
    const __m512 size = bits_as_floats(_mm512_andnot_si512(sign, floats_as_bits(code)));
    const __m512 m = code * size * first_share * first_scale;
    const __m512 root = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v_codes));
    const __m512 square = root * root;
    const __m512 v = square * square * second_share * second_scale;
    const __m512 g = sixteen_of(grad + i) * clip;
    const __m512 from = bits_as_floats(_mm512_ternarylogic_epi32(
        near, floats_as_bits(m), floats_as_bits(g), 0xca));  // near ? m : g
    const __m512 first = from + step * (g - m);
    const __m512 second = v * beta2 + rest2 * g * g;
    tops[0] = _mm512_max_epu32(tops[0], _mm512_andnot_si512(sign, floats_as_bits(first)));
    tops[1] = _mm512_max_epu32(tops[1], _mm512_andnot_si512(sign, floats_as_bits(second)));
    _mm512_storeu_ps(out.m + i, first);
    _mm512_storeu_ps(out.v + i, second);
    _mm512_storeu_ps(out.roots + i, _mm512_sqrt_ps(second));
  }
  first_top = as_float(_mm512_reduce_max_epu32(tops[0]));
  second_top = as_float(_mm512_reduce_max_epu32(tops[1]));
  return i;
}
#endif

// Decodes a block's moments and updates them; the tops are their largest sizes.
template <class Grad>
static void update_coded(const Numbers& x, const Grad* grad, const CodedMoments& coded,
                         const DecodedMoments& out, int n, float& first_top, float& second_top) {
  int done = 0;
#if MERIT_AVX512
  done = update_lanes(x, grad, coded, out, n, first_top, second_top);
  if (done == n) return;
#endif
  decode<false>(coded.m + done, *coded.m_scale, out.m + done, n - done);
  decode<true>(coded.v + done, *coded.v_scale, out.v + done, n - done);
  for (int i = done; i < n; i++) {
    const Moved moved = x.moved(value_of(grad[i]), out.m[i], out.v[i]);
    out.m[i] = moved.first;
    out.v[i] = moved.second;
    out.roots[i] = std::sqrt(moved.second);
  }
  first_top = largest_size(out.m, n);
  second_top = largest_size(out.v, n);
}
