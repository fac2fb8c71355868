// CountSketch of dY^T X without dY^T X: a tile of the product stays in registers over all tokens, then goes to its
// buckets. Included inside a level's namespace, after sketch.inl. Each entry is one chain of fused multiply-adds over
// the tokens in order (fmaf where there is no instruction), so every level gives the same bits.

// The order in which tiles reach the buckets is the same on every level, whatever fits in its registers.
static const int kTileRows = 6, kTileBlocks = 4;

// tile[a, :] = sum_t dy_t[a, t] * x[t, :] for ROWS rows and 16 * BLOCKS columns.
template <int ROWS, int BLOCKS>
static inline void product_tile(const float* dy_t, const float* x, int64_t tokens, int64_t x_stride, float* tile) {
#if defined(MERIT_AVX512)
  __m512 sum[ROWS][BLOCKS];  // 24 of 32 registers
  for (int a = 0; a < ROWS; a++)
    for (int b = 0; b < BLOCKS; b++) sum[a][b] = _mm512_setzero_ps();
  for (int64_t t = 0; t < tokens; t++) {
    __m512 column[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) column[b] = _mm512_loadu_ps(x + t * x_stride + 16 * b);
    for (int a = 0; a < ROWS; a++) {
      const __m512 y = _mm512_set1_ps(dy_t[a * tokens + t]);
      for (int b = 0; b < BLOCKS; b++) sum[a][b] = _mm512_fmadd_ps(y, column[b], sum[a][b]);
    }
  }
  for (int a = 0; a < ROWS; a++)
    for (int b = 0; b < BLOCKS; b++) _mm512_store_ps(tile + (a * BLOCKS + b) * 16, sum[a][b]);
#elif defined(MERIT_AVX2)
  for (int b = 0; b < BLOCKS; b++) {
    __m256 low[ROWS], high[ROWS];  // 12 of 16 registers
    for (int a = 0; a < ROWS; a++) low[a] = high[a] = _mm256_setzero_ps();
    for (int64_t t = 0; t < tokens; t++) {
      const float* column = x + t * x_stride + 16 * b;
      const __m256 column_low = _mm256_loadu_ps(column), column_high = _mm256_loadu_ps(column + 8);
      for (int a = 0; a < ROWS; a++) {
        const __m256 y = _mm256_set1_ps(dy_t[a * tokens + t]);
        low[a] = _mm256_fmadd_ps(y, column_low, low[a]);
        high[a] = _mm256_fmadd_ps(y, column_high, high[a]);
      }
    }
    for (int a = 0; a < ROWS; a++) {
      _mm256_store_ps(tile + (a * BLOCKS + b) * 16, low[a]);
      _mm256_store_ps(tile + (a * BLOCKS + b) * 16 + 8, high[a]);
    }
  }
#else
  for (int i = 0; i < ROWS * BLOCKS * 16; i++) tile[i] = 0.f;
  for (int64_t t = 0; t < tokens; t++)
    for (int a = 0; a < ROWS; a++)
      for (int j = 0; j < BLOCKS * 16; j++) {
        float& sum = tile[a * BLOCKS * 16 + j];
        sum = std::fma(dy_t[a * tokens + t], x[t * x_stride + j], sum);
      }
#endif
}

template <int ROWS, int BLOCKS>
static inline void sketch_tile(const LinearSketch& job, const float* dy_t, const float* x, int64_t row, int64_t block,
                               float* out) {
  alignas(64) float tile[ROWS * BLOCKS * 16];
  product_tile<ROWS, BLOCKS>(dy_t + row * job.tokens, x + block * 16, job.tokens, job.cols, tile);
  const uint64_t buckets = uint64_t(job.proj_dim / 16), blocks = uint64_t(job.cols / 16);
  for (int a = 0; a < ROWS; a++)
    for (int b = 0; b < BLOCKS; b++) {
      const uint64_t h = hash_block(job.key, uint64_t(row + a) * blocks + uint64_t(block + b));
      float* bucket = out + (((h >> 32) * buckets) >> 32) * 16;
      add_block(tile + (a * BLOCKS + b) * 16, (h >> 16) & 15u, h & 0xffffu, bucket);
    }
}

template <int BLOCKS>
static inline void sketch_panel(const LinearSketch& job, const float* dy_t, const float* x, int64_t block, float* out) {
  int64_t row = 0;
  for (; row + kTileRows <= job.rows; row += kTileRows) sketch_tile<kTileRows, BLOCKS>(job, dy_t, x, row, block, out);
  for (; row < job.rows; row++) sketch_tile<1, BLOCKS>(job, dy_t, x, row, block, out);
}

void sketch_linear(const LinearSketch& job) {
  const int64_t blocks = job.cols / 16;
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t b = 0; b < job.batch; b++) {
    const float* dy_t = job.dy_t + b * job.rows * job.tokens;
    const float* x = job.x + b * job.tokens * job.cols;
    float* out = job.out + b * job.proj_dim;
    int64_t block = 0;
    for (; block + kTileBlocks <= blocks; block += kTileBlocks) sketch_panel<kTileBlocks>(job, dy_t, x, block, out);
    for (; block < blocks; block++) sketch_panel<1>(job, dy_t, x, block, out);
  }
}
