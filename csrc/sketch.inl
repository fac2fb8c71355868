// Blocked CountSketch, hash version 1 (defined in kernels/sketch/__init__.py). Included inside a level's namespace.

// Position in a parameter -> 64 random bits: the finalizer of SplitMix64 (Steele, Lea & Flood 2014).
static inline uint64_t hash_block(uint64_t key, uint64_t block) {
  uint64_t z = key + (block + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// row[j] += sign_j * v[j ^ lane_xor] for 16 lanes; bit j of `signs` set means minus.
static inline void add_block(const float* v, uint32_t lane_xor, uint32_t signs, float* row) {
#if defined(MERIT_AVX512)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i source = _mm512_xor_si512(lanes, _mm512_set1_epi32(int(lane_xor)));
  const __m512 value = _mm512_permutexvar_ps(source, _mm512_loadu_ps(v));
  const __m512 old = _mm512_loadu_ps(row);
  const __m512 sum = _mm512_mask_sub_ps(_mm512_add_ps(old, value), __mmask16(signs), old, value);
  _mm512_storeu_ps(row, sum);
#elif defined(MERIT_AVX2)
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i source = _mm256_xor_si256(lanes, _mm256_set1_epi32(int(lane_xor & 7)));
  const __m256i to_top_bit = _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31);
  const __m256i top_bit = _mm256_set1_epi32(int(0x80000000u));
  for (int half = 0; half < 2; half++) {
    const int from = half ^ int(lane_xor >> 3);
    const __m256 value = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v + 8 * from), source);
    const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32(int(signs >> (8 * half))), to_top_bit);
    const __m256 minus = _mm256_castsi256_ps(_mm256_and_si256(bits, top_bit));
    float* at = row + 8 * half;
    _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), _mm256_xor_ps(value, minus)));
  }
#else
  for (uint32_t j = 0; j < 16; j++) {
    uint32_t bits;
    std::memcpy(&bits, v + (j ^ lane_xor), 4);
    bits ^= ((signs >> j) & 1u) << 31;
    float value;
    std::memcpy(&value, &bits, 4);
    row[j] += value;
  }
#endif
}

static inline void load_block(const SketchRows& job, int64_t at, int count, float* v) {
  for (int j = count; j < 16; j++) v[j] = 0.f;
  if (job.bf16) {
    const uint16_t* x = static_cast<const uint16_t*>(job.x) + at;
    for (int j = 0; j < count; j++) {
      const uint32_t bits = uint32_t(x[j]) << 16;
      std::memcpy(v + j, &bits, 4);
    }
  } else {
    std::memcpy(v, static_cast<const float*>(job.x) + at, size_t(count) * 4);
  }
}

void sketch_rows(const SketchRows& job) {
  const int64_t blocks = (job.cols + 15) / 16, whole = job.cols / 16;
  const uint64_t buckets = uint64_t(job.proj_dim / 16);
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t b = 0; b < job.batch; b++) {
    float* out = job.out + b * job.proj_dim;
    for (int64_t r = 0; r < job.rows; r++) {
      const int64_t row = job.row_ids ? job.row_ids[b * job.rows + r] : job.first_row + r;
      const int64_t start = b * job.batch_stride + r * job.row_stride;
      for (int64_t c = 0; c < blocks; c++) {
        const uint64_t h = hash_block(job.key, uint64_t(row * blocks + c));
        float* bucket = out + (((h >> 32) * buckets) >> 32) * 16;
        const uint32_t lane_xor = (h >> 16) & 15u, signs = h & 0xffffu;
        if (c < whole && !job.bf16) {
          add_block(static_cast<const float*>(job.x) + start + c * 16, lane_xor, signs, bucket);
        } else {
          alignas(64) float v[16];
          load_block(job, start + c * 16, c < whole ? 16 : int(job.cols - whole * 16), v);
          add_block(v, lane_xor, signs, bucket);
        }
      }
    }
  }
}
