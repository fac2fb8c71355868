// CountSketch of dY^T X, which is never stored: blocks of the product stay in registers over a
// chunk of tokens, then are added to their bucket. dY and X are packed in words of 32 bits: a
// float, or a pair of tokens if both sides are bf16 and the level has dot products of bf16.

// A block of the product: 16 vector registers of sums.
static const int kRows = 8, kCols = 32;
// Words of the reduction at a time: a panel of X fills a third of L1.
static const int64_t kDepth = 128;
// Words of packed X.
static const int64_t kPanelWords = kLinearScratch - kTile * kDepth;

#if defined(MERIT_AVX512_BF16)
static const bool kHasPairs = true;
#else
static const bool kHasPairs = false;
#endif

static inline uint32_t word_of(float value) { return as_bits(value); }
static inline uint32_t word_of(uint16_t value) { return uint32_t(value) << 16; }

// Returns the word of one column: a float, or the tokens of `row` and `next` (null: zero).
template <bool PAIRS, class T>
static inline uint32_t word_at(const T* row, const T* next, int64_t column) {
  if constexpr (PAIRS)
    return uint32_t(row[column]) | (next ? uint32_t(next[column]) << 16 : 0u);
  else
    return word_of(row[column]);
}

// Writes word k of column at + g * W + j, from token `token` on, to out[g][k][j]; entries outside
// of the matrix are zero. Takes token by token: if rows lie apart by a power of two, cache lines of
// many rows would evict each other.
template <int W, bool PAIRS, class T>
static inline void pack_rows(const SketchMatrix& m, int64_t token, int64_t tokens, int64_t at,
                             int64_t groups, uint32_t* out) {
  const int64_t step = PAIRS ? 2 : 1, words = (tokens + step - 1) / step;
  for (int64_t k = 0; k < words; k++, out += W) {
    const T* row = static_cast<const T*>(m.data) + (token + k * step) * m.row_stride;
    const T* next = PAIRS && k * step + 1 < tokens ? row + m.row_stride : nullptr;
    uint32_t* to = out;
    for (int64_t g = 0, column = at; g < groups; g++, column += W, to += words * W) {
      if (column >= 0 && column + W <= m.cols && (!PAIRS || next)) {
        for (int j = 0; j < W; j++) {
          if constexpr (PAIRS)
            to[j] = uint32_t(row[column + j]) | uint32_t(next[column + j]) << 16;
          else
            to[j] = word_of(row[column + j]);
        }
      } else {
        for (int j = 0; j < W; j++) {
          const bool inside = column + j >= 0 && column + j < m.cols;
          to[j] = inside ? word_at<PAIRS>(row, next, column + j) : 0u;
        }
      }
    }
  }
}

template <int W, bool PAIRS>
static inline void pack(const SketchMatrix& m, int64_t token, int64_t tokens, int64_t at,
                        int64_t groups, uint32_t* out) {
  if constexpr (PAIRS)
    pack_rows<W, true, uint16_t>(m, token, tokens, at, groups, out);
  else if (m.bf16)
    pack_rows<W, false, uint16_t>(m, token, tokens, at, groups, out);
  else
    pack_rows<W, false, float>(m, token, tokens, at, groups, out);
}

#if defined(MERIT_AVX512)
typedef __m512 Sums[kRows][2];

// sum[a] = sum over k of left[k, a] * right[k, :], in 16 of 32 registers.
template <bool PAIRS>
static inline __attribute__((always_inline)) void product_sums(const uint32_t* left,
                                                               const uint32_t* right, int64_t words,
                                                               Sums& sum) {
  for (int a = 0; a < kRows; a++) sum[a][0] = sum[a][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < words; k++, left += kRows, right += kCols) {
    const __m512i low = _mm512_load_si512(right), high = _mm512_load_si512(right + 16);
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
#endif

// block[a, j] = sum over k of left[k, a] * right[k, j], a < kRows, j < kCols.
template <bool PAIRS>
static inline void product_block(const uint32_t* left, const uint32_t* right, int64_t words,
                                 float* block) {
#if defined(MERIT_AVX512)
  Sums sum;
  product_sums<PAIRS>(left, right, words, sum);
  for (int a = 0; a < kRows; a++) {
    _mm512_store_ps(block + a * kCols, sum[a][0]);
    _mm512_store_ps(block + a * kCols + 16, sum[a][1]);
  }
#elif defined(MERIT_AVX2)
  for (int part = 0; part < 4; part++) {  // 4 rows x 16 columns: 8 of 16 registers
    const uint32_t *y = left + (part >> 1) * 4, *x = right + (part & 1) * 16;
    __m256 low[4], high[4];
    for (int a = 0; a < 4; a++) low[a] = high[a] = _mm256_setzero_ps();
    for (int64_t k = 0; k < words; k++, y += kRows, x += kCols) {
      const __m256 x_low =
          _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(x)));
      const __m256 x_high =
          _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(x + 8)));
      for (int a = 0; a < 4; a++) {
        const __m256 value = _mm256_castsi256_ps(_mm256_set1_epi32(int(y[a])));
        low[a] = _mm256_fmadd_ps(value, x_low, low[a]);
        high[a] = _mm256_fmadd_ps(value, x_high, high[a]);
      }
    }
    for (int a = 0; a < 4; a++) {
      float* row = block + ((part >> 1) * 4 + a) * kCols + (part & 1) * 16;
      _mm256_store_ps(row, low[a]);
      _mm256_store_ps(row + 8, high[a]);
    }
  }
#else
  for (int i = 0; i < kRows * kCols; i++) block[i] = 0.f;
  for (int64_t k = 0; k < words; k++, left += kRows, right += kCols) {
    float x[kCols];
    std::memcpy(x, right, sizeof(x));
    for (int a = 0; a < kRows; a++) {
      float y;
      std::memcpy(&y, left + a, 4);
      for (int j = 0; j < kCols; j++) block[a * kCols + j] += y * x[j];
    }
  }
#endif
}

// block[a, j] *= the scale of row `row` + a and column `col` + j of the shard, outside of which the
// block is zero.
static inline void scale_block(const LinearSketch& job, int64_t row, int64_t col, float* block) {
  const int64_t top = row < 0 ? -row : 0;
  const int64_t bottom = row + kRows > job.dy.cols ? job.dy.cols - row : kRows;
  const int64_t first = col < 0 ? -col : 0;
  const int64_t last = col + kCols > job.x.cols ? job.x.cols - col : kCols;
  for (int64_t a = top; a < bottom; a++)
    for (int64_t j = first; j < last; j++)
      block[a * kCols + j] *= job.scale[(row + a) * job.scale_stride + col + j];
}

// Adds rows first .. first + 7 and columns half .. half + 31 of a tile to their bucket; from
// registers, if there is no scale and vectors are wide.
template <bool PAIRS>
static inline void sketch_block(const LinearSketch& job, const Tile& tile, int64_t row, int64_t col,
                                int first, int half, const uint32_t* left, const uint32_t* right,
                                int64_t words) {
#if defined(MERIT_AVX512)
  if (!job.scale) {
    Sums sum;
    product_sums<PAIRS>(left, right, words, sum);
    for (int a = 0; a < kRows; a++) {
      uint64_t signs;
      float* to = bucket_row(tile, first + a, signs);
      add16(sum[a][0], half, tile.col_mask, signs, to);
      add16(sum[a][1], half + 16, tile.col_mask, signs, to);
    }
    return;
  }
#endif
  alignas(64) float block[kRows * kCols];
  product_block<PAIRS>(left, right, words, block);
  if (job.scale) scale_block(job, row + first, col + half, block);
  for (int a = 0; a < kRows; a++) {
    uint64_t signs;
    float* to = bucket_row(tile, first + a, signs);
    add_run<kCols>(block + a * kCols, half, tile.col_mask, signs, to);
  }
}

// Adds the tile at (row, col) of the shard to its bucket: the products of dY packed in `left` and X
// packed in `right`.
template <bool PAIRS>
static inline void sketch_tile(const LinearSketch& job, const Tile& tile, int64_t row, int64_t col,
                               const uint32_t* left, const uint32_t* right, int64_t words) {
  for (int half = 0; half < kTile && col + half < job.x.cols; half += kCols)
    for (int first = 0; first < kTile && row + first < job.dy.cols; first += kRows)
      sketch_block<PAIRS>(job, tile, row, col, first, half, left + first * words,
                          right + half * words, words);
}

// Multiplies all strips of 64 rows with the column tiles from .. to - 1, whose words are packed in
// `panel`.
template <bool PAIRS>
static void sketch_panel(const LinearSketch& job, int64_t token, int64_t tokens, int64_t from,
                         int64_t to, int part, float* out, const uint32_t* panel, uint32_t* left) {
  const int64_t words = PAIRS ? (tokens + 1) / 2 : tokens;
  const int64_t top = job.first_row / kTile,
                bottom = (job.first_row + job.dy.cols + kTile - 1) / kTile;
  Strip strip;
  for (int64_t s = top; s < bottom; s++) {
    draw_strip(job, s, from, to, part, out, strip);
    if (!strip.count) continue;
    const int64_t row = s * kTile - job.first_row;
    pack<kRows, PAIRS>(job.dy, token, tokens, row, kTile / kRows, left);
    for (int k = 0; k < strip.count; k++) {
      const uint32_t* right = panel + (strip.column[k] / kTile - from) * kTile * words;
      sketch_tile<PAIRS>(job, strip.tiles[k], row, strip.column[k] - job.first_col, left, right,
                         words);
    }
  }
}

// Returns where a panel ends that begins at column tile `from`: between groups where that spares
// the part strips of dY.
static inline int64_t panel_end(const LinearSketch& job, int64_t from, int64_t to, int64_t right) {
  if (to >= right) return right;
  const int64_t q = job.group_cols;
  return job.parts > 1 && owns_rows(job) && to / q * q > from ? to / q * q : to;
}

template <bool PAIRS>
static void sketch_example(const LinearSketch& job, int64_t b, int part, uint32_t* scratch) {
  float* out = job.out + b * job.proj_dim;
  const int64_t begin = job.offsets[b], end = job.offsets[b + 1],
                depth = PAIRS ? 2 * kDepth : kDepth;
  const int64_t left = job.first_col / kTile,
                right = (job.first_col + job.x.cols + kTile - 1) / kTile;
  uint32_t* panel = scratch + kTile * kDepth;
  for (int64_t token = begin; token < end; token += depth) {
    const int64_t tokens = token + depth < end ? depth : end - token,
                  words = PAIRS ? (tokens + 1) / 2 : tokens;
    int64_t wide = kPanelWords / (words * kTile);
    if (wide > kStrip) wide = kStrip;
    for (int64_t from = left, to; from < right; from = to) {
      to = panel_end(job, from, from + wide, right);
      pack<kCols, PAIRS>(job.x, token, tokens, from * kTile - job.first_col, (to - from) * 2,
                         panel);
      sketch_panel<PAIRS>(job, token, tokens, from, to, part, out, panel, scratch);
    }
  }
}

// Parts own disjoint buckets, so threads share an example without a conflict, and the order of sums
// is always the same.
static void sketch_linear(const LinearSketch& job) {
#pragma omp parallel num_threads(job.threads)
  {
    uint32_t* scratch = job.scratch + kLinearScratch * omp_get_thread_num();
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < job.examples * job.parts; item++) {
      if (kHasPairs && job.dy.bf16 && job.x.bf16)
        sketch_example<kHasPairs>(job, item / job.parts, int(item % job.parts), scratch);
      else
        sketch_example<false>(job, item / job.parts, int(item % job.parts), scratch);
    }
  }
}
