// How moments and weights of each kind are read and written, element by element in one loop.

// In loops that vectorize only if all of them is in line.
#define MERIT_INLINE __attribute__((always_inline))

template <class T>
static inline T* at(void* data, int64_t first) {
  return static_cast<T*>(data) + first;
}

// Joins a bf16 weight with the bits below it. They are signed, since the weight is rounded to
// nearest, with halves away from zero.
static inline float joined(uint16_t weight, int32_t low) {
  return as_float((uint32_t(weight) << 16) + uint32_t(low));
}

static inline uint32_t with_one_nan(uint32_t bits) {
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
}

struct FloatMoments {
  float *m, *v;

  MERIT_INLINE float first(int i) const { return m[i]; }
  MERIT_INLINE float second(int i) const { return v[i]; }
  MERIT_INLINE void store(int i, float first, float second) const {
    m[i] = first;
    v[i] = second;
  }
};

template <bool Stochastic>
struct Bf16Moments {
  uint16_t *m, *v;
  RandomRun random;

  MERIT_INLINE float first(int i) const { return widen(m[i]); }
  MERIT_INLINE float second(int i) const { return widen(v[i]); }
  MERIT_INLINE void store(int i, float first, float second) const {
    if constexpr (Stochastic) {
      const uint32_t bits = random.of_moments(i);
      m[i] = stochastic_bf16(first, bits >> 16);
      v[i] = stochastic_bf16(second, bits & 0xffffu);
    } else {
      m[i] = bits_to_bf16(as_bits(first));
      v[i] = bits_to_bf16(as_bits(second));
    }
  }
};

struct FloatWeight {
  float* w;

  MERIT_INLINE float load(int i, uint32_t&) const { return w[i]; }
  MERIT_INLINE void store(int i, float value) const { w[i] = value; }
};

template <bool Stochastic>
struct Bf16Weight {
  uint16_t* w;
  RandomRun random;

  MERIT_INLINE float load(int i, uint32_t&) const { return widen(w[i]); }
  MERIT_INLINE void store(int i, float value) const {
    if constexpr (Stochastic)
      w[i] = stochastic_bf16(value, random.of_weight(i) >> 16);
    else
      w[i] = bits_to_bf16(as_bits(value));
  }
};

// A weight that is not its master rounded was written by someone else: it is the master then.
struct FloatMaster {
  uint16_t* w;
  float* master;

  MERIT_INLINE float load(int i, uint32_t& won) const {
    const uint32_t bits = as_bits(master[i]);
    const uint32_t differs = bits_to_bf16(bits) == w[i] ? 0u : ~0u;
    won |= (w[i] & 0x7fffu) > 0x7f80u ? 0u : differs;  // not for NaN, which has many bits
    return as_float((bits & ~differs) | ((uint32_t(w[i]) << 16) & differs));
  }
  MERIT_INLINE void store(int i, float value) const {
    master[i] = value;
    w[i] = bits_to_bf16(as_bits(value));
  }
};

struct SplitMaster {
  uint16_t* w;
  int16_t* low;

  MERIT_INLINE float load(int i, uint32_t&) const { return joined(w[i], low[i]); }
  MERIT_INLINE void store(int i, float value) const {
    const uint32_t bits = with_one_nan(as_bits(value));
    w[i] = uint16_t((bits + 0x8000u) >> 16);
    low[i] = int16_t(bits & 0xffffu);
  }
};

// 24 bits of the master are kept.
template <bool Stochastic>
struct Split8Master {
  uint16_t* w;
  int8_t* low;
  RandomRun random;

  MERIT_INLINE float load(int i, uint32_t&) const { return joined(w[i], int32_t(low[i]) * 256); }
  MERIT_INLINE void store(int i, float value) const {
    const uint32_t noise = Stochastic ? random.of_weight(i) >> 24 : 0x80u;
    const uint32_t bits = with_one_nan(with_random(value, noise));
    w[i] = uint16_t((bits + 0x8000u) >> 16);
    low[i] = int8_t((bits >> 8) & 0xffu);
  }
};
