// SplitMix64 (Steele, Lea & Flood 2014) of all CPU kernels. Every level inlines it, so that loops
// over it vectorize. csrc/cuda/sketch_linear.cu repeats it, since NVRTC compiles that file without
// headers.

// Returns number `counter` of the stream that starts at `key`: 64 random bits.
static inline uint64_t splitmix64(uint64_t key, uint64_t counter) {
  uint64_t z = key + (counter + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
