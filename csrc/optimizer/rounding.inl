// Random bits and stochastic rounding to bf16.

// Returns 32 random bits of element i: two rounds of Wellons' lowbias32 with a key before each.
struct RandomBits {
  uint32_t before, between;

  uint32_t operator()(uint32_t i) const {
    uint32_t x = i ^ before;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= between;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
  }
};

// Adds 16 random bits below the last bit of bf16 and cuts them off: rounds up with the probability
// of the part that is cut. Nothing finite becomes infinite.
static inline uint16_t stochastic_bf16(float value, uint32_t random16) {
  const uint32_t bits = as_bits(value), size = bits & 0x7fffffffu;
  const uint32_t sum = bits + random16;
  const bool past = (sum & 0x7fffffffu) >= 0x7f800000u;  // also for infinity itself
  const uint32_t cut = (past ? bits : sum) >> 16;
  return uint16_t(size > 0x7f800000u ? 0x7fc0u : cut);
}

// Fills the bits of n elements of the whole parameter from ``first`` on. Elements beyond 2^32 have
// other keys.
static void fill_random(RandomBits random, uint64_t first, uint32_t* bits, int n) {
  for (int done = 0; done < n;) {
    const uint32_t low = uint32_t(first + uint64_t(done));
    const uint32_t far = uint32_t((first + uint64_t(done)) >> 32) * 0x9e3779b9u;
    const RandomBits near{random.before, random.between ^ far};
    const uint64_t border = (uint64_t(1) << 32) - low;
    const int stop = border < uint64_t(n - done) ? done + int(border) : n;
    for (int i = done; i < stop; i++) bits[i] = near(low + uint32_t(i - done));
    done = stop;
  }
}

static void store_bf16_stochastic(const float* x, uint16_t* out, int n, const uint32_t* bits,
                                  int shift) {
  for (int i = 0; i < n; i++) out[i] = stochastic_bf16(x[i], (bits[i] >> shift) & 0xffffu);
}
