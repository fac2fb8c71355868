// Blocks of a product, whose sums stay in registers.

// A block of the product: 16 vector registers of sums.
static const int kRows = 8, kCols = 32;

// Words from .. to - 1 of the operands, and which blocks of rows and columns they reach.
struct Segment {
  int64_t from, to;
  uint32_t rows, cols;  // bits
};

// Operands of tiles whose products add up.
struct Batch {
  uint32_t *left, *right;
  int64_t plane;  // words from one plane of an operand to the next
  Segment segments[kDepth];
  int count;
  int64_t words;
};

// Returns a bit for every run of `size` places that columns of the matrix reach.
static inline uint32_t runs_inside(const SketchMatrix& m, const Side& side, int size) {
  const uint64_t inside = columns_inside(m, side.at), run = ~uint64_t(0) >> (64 - size);
  uint32_t found = 0;
  for (int place = 0; place < kTile; place += size) {
    const uint32_t column = (uint32_t(place) ^ side.mask) & ~uint32_t(size - 1);
    found |= uint32_t((inside >> column & run) != 0) << place / size;
  }
  return found;
}

#if defined(MERIT_AVX512)
typedef __m512 Sums[kRows][2];

// sum[a] += sum over the segment's words k of left[k, a] * right[k, :], in 16 of 32 registers.
template <bool PAIRS>
static inline __attribute__((always_inline)) void add_products(const uint32_t* left,
                                                               const uint32_t* right, int64_t plane,
                                                               const Segment& segment, Sums& sum) {
  left += segment.from * kLanes;
  right += segment.from * kLanes;
  for (int64_t k = segment.from; k < segment.to; k++, left += kLanes, right += kLanes) {
    const __m512i low = _mm512_load_si512(right), high = _mm512_load_si512(right + plane);
    for (int a = 0; a < kRows; a++) {
      const __m512i y = _mm512_set1_epi32(int(left[a]));
#if defined(MERIT_AVX512_BF16)
      if constexpr (PAIRS) {
        sum[a][0] = _mm512_dpbf16_ps(sum[a][0], (__m512bh)y, (__m512bh)low);
        sum[a][1] = _mm512_dpbf16_ps(sum[a][1], (__m512bh)y, (__m512bh)high);
        continue;
      }
#endif
      sum[a][0] = _mm512_fmadd_ps(_mm512_castsi512_ps(y), _mm512_castsi512_ps(low), sum[a][0]);
      sum[a][1] = _mm512_fmadd_ps(_mm512_castsi512_ps(y), _mm512_castsi512_ps(high), sum[a][1]);
    }
  }
}
#elif defined(MERIT_AVX2)
// block[a, j] = the same for 4 rows and 16 columns, added to what is there unless it is the first
// segment: 8 of 16 registers.
static inline void add_products(const uint32_t* left, const uint32_t* right, const Segment& segment,
                                bool is_first, float* block) {
  __m256 low[4], high[4];
  for (int a = 0; a < 4; a++) {
    low[a] = is_first ? _mm256_setzero_ps() : _mm256_load_ps(block + a * kCols);
    high[a] = is_first ? _mm256_setzero_ps() : _mm256_load_ps(block + a * kCols + 8);
  }
  left += segment.from * kLanes;
  right += segment.from * kLanes;
  for (int64_t k = segment.from; k < segment.to; k++, left += kLanes, right += kLanes) {
    const __m256 x_low =
        _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(right)));
    const __m256 x_high =
        _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(right + 8)));
    for (int a = 0; a < 4; a++) {
      const __m256 y = _mm256_castsi256_ps(_mm256_set1_epi32(int(left[a])));
      low[a] = _mm256_fmadd_ps(y, x_low, low[a]);
      high[a] = _mm256_fmadd_ps(y, x_high, high[a]);
    }
  }
  for (int a = 0; a < 4; a++) {
    _mm256_store_ps(block + a * kCols, low[a]);
    _mm256_store_ps(block + a * kCols + 8, high[a]);
  }
}
#endif

#if !defined(MERIT_AVX512)
static inline void clear_block(float* block) {
  for (int i = 0; i < kRows * kCols; i++) block[i] = 0.f;
}
#endif

// block[a, j] = sum over the batch's words k of left[k, a] * right[k, j], a < kRows, j < kCols.
template <bool PAIRS>
static inline __attribute__((always_inline)) void product_block(const Batch& batch, int row_run,
                                                                int col_run, float* block) {
  const uint32_t* left = batch.left + row_run / 2 * batch.plane + row_run % 2 * kRows;
  const uint32_t* right = batch.right + col_run * 2 * batch.plane;
#if defined(MERIT_AVX512)
  Sums sum;
  for (int a = 0; a < kRows; a++) sum[a][0] = sum[a][1] = _mm512_setzero_ps();
#else
  bool is_first = true;
#endif
  for (int s = 0; s < batch.count; s++) {
    const Segment& segment = batch.segments[s];
    if (!(segment.rows >> row_run & 1) || !(segment.cols >> col_run & 1)) continue;
#if defined(MERIT_AVX512)
    add_products<PAIRS>(left, right, batch.plane, segment, sum);
#elif defined(MERIT_AVX2)
    for (int part = 0; part < 4; part++)
      add_products(left + (part >> 1) * 4, right + (part & 1) * batch.plane, segment, is_first,
                   block + (part >> 1) * 4 * kCols + (part & 1) * kLanes);
    is_first = false;
#else
    if (is_first) clear_block(block);
    is_first = false;
    for (int64_t k = segment.from; k < segment.to; k++) {
      float x[kCols], y[kRows];
      std::memcpy(x, right + k * kLanes, sizeof(x) / 2);
      std::memcpy(x + kLanes, right + k * kLanes + batch.plane, sizeof(x) / 2);
      std::memcpy(y, left + k * kLanes, sizeof(y));
      for (int a = 0; a < kRows; a++)
        for (int j = 0; j < kCols; j++) block[a * kCols + j] += y[a] * x[j];
    }
#endif
  }
#if defined(MERIT_AVX512)
  for (int a = 0; a < kRows; a++) {
    _mm512_store_ps(block + a * kCols, sum[a][0]);
    _mm512_store_ps(block + a * kCols + 16, sum[a][1]);
  }
#else
  if (is_first) clear_block(block);
#endif
}

// block[a, j] *= the scale of row `row` + a and column `col` + j of the shard. The block is zero
// outside of the shard.
static inline void scale_block(const LinearSketch& job, int64_t row, int64_t col, float* block) {
  const int64_t top = row < 0 ? -row : 0;
  const int64_t bottom = row + kRows > job.dy.cols ? job.dy.cols - row : kRows;
  const int64_t first = col < 0 ? -col : 0;
  const int64_t last = col + kCols > job.x.cols ? job.x.cols - col : kCols;
  for (int64_t a = top; a < bottom; a++)
    for (int64_t j = first; j < last; j++)
      block[a * kCols + j] *= job.scale[(row + a) * job.scale_stride + col + j];
}

// Runs `take(row_run, col_run, block)` for every block of the batch's product that is not zero.
template <bool PAIRS, class Take>
static inline void for_each_block(const Batch& batch, const Take& take) {
  uint32_t rows = 0, cols = 0;
  for (int s = 0; s < batch.count; s++) {
    rows |= batch.segments[s].rows;
    cols |= batch.segments[s].cols;
  }
  alignas(64) float block[kRows * kCols];
  for (int col_run = 0; col_run < kTile / kCols; col_run++)
    for (int row_run = 0; row_run < kTile / kRows; row_run++) {
      if (!(rows >> row_run & 1) || !(cols >> col_run & 1)) continue;
      product_block<PAIRS>(batch, row_run, col_run, block);
      take(row_run, col_run, block);
    }
}
