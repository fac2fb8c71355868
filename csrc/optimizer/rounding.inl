// Random bits and stochastic rounding.

// Wellons' lowbias32.
static inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

static inline uint32_t folded(uint32_t x) { return x ^ (x >> 15); }

// Random bits of one step of one parameter: two rounds. The first is of an element's place in its
// kRandomBlock elements, and so a table; the second begins with a key of the block. The exclusive
// or of two folded numbers is their exclusive or folded, so both are folded in advance.
struct RandomTable {
  uint32_t high;
  alignas(64) uint32_t places[kRandomBlock];

  void fill(uint64_t key) {
    high = uint32_t(key >> 32);
    for (uint32_t i = 0; i < uint32_t(kRandomBlock); i++)
      places[i] = folded(mixed(i ^ uint32_t(key)));
  }
};

// Random bits of consecutive elements of one block.
struct RandomRun {
  const uint32_t* places;
  uint32_t weight_key, moment_key;

  RandomRun(const RandomTable& table, uint64_t first) {
    const uint64_t block = first / kRandomBlock;
    places = table.places + first % kRandomBlock;
    const uint32_t key = mixed(mixed(uint32_t(block) ^ table.high) ^ uint32_t(block >> 32));
    weight_key = folded(key);
    moment_key = folded(mixed(key + 0x9e3779b9u));
  }

  // The high 16 bits are the best.
  uint32_t product(int i, uint32_t key) const { return (places[i] ^ key) * 0x846ca68bu; }

  uint32_t of_weight(int i) const { return product(i, weight_key); }

  uint32_t of_moments(int i) const {
    const uint32_t x = product(i, moment_key);
    return x ^ (x >> 16);
  }
};

// Adds random bits below the last kept bit; the caller cuts them off: rounds up with the
// probability of the part that is cut. Nothing finite becomes infinite: from the largest value of
// bf16 on, nothing is added. NaN stays NaN, since arithmetic has set its first bit.
static inline uint32_t with_random(float value, uint32_t random) {
  const uint32_t bits = as_bits(value);
  const uint32_t below = 0u - uint32_t((bits & 0x7fffffffu) < 0x7f7f0000u);  // no branch
  return bits + (random & below);
}

static inline uint16_t stochastic_bf16(float value, uint32_t random16) {
  return uint16_t(with_random(value, random16) >> 16);
}
