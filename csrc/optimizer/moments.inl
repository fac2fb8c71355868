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

// Decodes a block's moments and updates them; the tops are their largest sizes.
template <class Grad>
static void update_coded(const Numbers& x, const Grad* grad, const CodedMoments& coded,
                         const BlockValues& out, int n, float& first_top, float& second_top) {
  uint32_t tops[2] = {};
  const float m_unit = first_unit(*coded.m_scale), v_unit = second_unit(*coded.v_scale);
  for (int i = 0; i < n; i++) {
    const Moved moved = x.moved(value_of(grad[i]), decoded_first(coded.m[i], m_unit),
                                decoded_second(coded.v[i], v_unit));
    out.m[i] = moved.first;
    out.roots[i] = std::sqrt(moved.second);
    const uint32_t first = as_bits(moved.first) & 0x7fffffffu;
    const uint32_t second = as_bits(moved.second) & 0x7fffffffu;
    tops[0] = first > tops[0] ? first : tops[0];
    tops[1] = second > tops[1] ? second : tops[1];
  }
  first_top = as_float(tops[0]);
  second_top = as_float(tops[1]);
}
