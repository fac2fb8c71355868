// CountSketch of dY^T X, which is never stored. The tiles that go to one bucket are one long matrix
// product, whose reduction runs over tiles and tokens; its blocks stay in registers.

// A block of the product: 16 vector registers of sums.
static const int kRows = 8, kCols = 32;

// Words from .. to - 1 of the operands, and which blocks of rows and columns they reach.
struct Segment {
  int64_t from, to;
  uint32_t rows, cols;  // bits
};

// Tiles whose products go to one bucket, at most kDepth words of them.
struct Batch {
  alignas(64) uint32_t left[kOperandWords], right[kOperandWords];
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

// Appends the operands of one tile.
template <bool PAIRS>
static inline void append_tile(const LinearSketch& job, int64_t token, int64_t tokens,
                               const Side& row, const Side& col, Batch& batch) {
  const int64_t words = PAIRS ? (tokens + 1) / 2 : tokens;
  place<PAIRS>(job.dy, token, tokens, row, batch.left + batch.words * kLanes);
  place<PAIRS>(job.x, token, tokens, col, batch.right + batch.words * kLanes);
  const uint32_t rows = runs_inside(job.dy, row, kRows), cols = runs_inside(job.x, col, kCols);
  const int64_t end = batch.words + words;
  Segment* last = batch.segments + batch.count - 1;
  if (batch.count && last->rows == rows && last->cols == cols)
    last->to = end;
  else
    batch.segments[batch.count++] = {batch.words, end, rows, cols};
  batch.words = end;
}

#if defined(MERIT_AVX512)
typedef __m512 Sums[kRows][2];

// sum[a] += sum over the segment's words k of left[k, a] * right[k, :], in 16 of 32 registers.
template <bool PAIRS>
static inline __attribute__((always_inline)) void add_products(const uint32_t* left,
                                                               const uint32_t* right,
                                                               const Segment& segment, Sums& sum) {
  left += segment.from * kLanes;
  right += segment.from * kLanes;
  for (int64_t k = segment.from; k < segment.to; k++, left += kLanes, right += kLanes) {
    const __m512i low = _mm512_load_si512(right), high = _mm512_load_si512(right + kPlaneWords);
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
// block[a, j] += the same for 4 rows and 16 columns: 8 of 16 registers.
static inline void add_products(const uint32_t* left, const uint32_t* right, const Segment& segment,
                                float* block) {
  __m256 low[4], high[4];
  for (int a = 0; a < 4; a++) {
    low[a] = _mm256_load_ps(block + a * kCols);
    high[a] = _mm256_load_ps(block + a * kCols + 8);
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

// block[a, j] = sum over the batch's words k of left[k, a] * right[k, j], a < kRows, j < kCols.
template <bool PAIRS>
static inline void product_block(const Batch& batch, int row_run, int col_run, float* block) {
  const uint32_t* left = batch.left + row_run / 2 * kPlaneWords + row_run % 2 * kRows;
  const uint32_t* right = batch.right + col_run * 2 * kPlaneWords;
#if defined(MERIT_AVX512)
  Sums sum;
  for (int a = 0; a < kRows; a++) sum[a][0] = sum[a][1] = _mm512_setzero_ps();
#else
  for (int i = 0; i < kRows * kCols; i++) block[i] = 0.f;
#endif
  for (int s = 0; s < batch.count; s++) {
    const Segment& segment = batch.segments[s];
    if (!(segment.rows >> row_run & 1) || !(segment.cols >> col_run & 1)) continue;
#if defined(MERIT_AVX512)
    add_products<PAIRS>(left, right, segment, sum);
#elif defined(MERIT_AVX2)
    for (int part = 0; part < 4; part++)
      add_products(left + (part >> 1) * 4, right + (part & 1) * kPlaneWords, segment,
                   block + (part >> 1) * 4 * kCols + (part & 1) * kLanes);
#else
    for (int64_t k = segment.from; k < segment.to; k++) {
      float x[kCols], y[kRows];
      std::memcpy(x, right + k * kLanes, sizeof(x) / 2);
      std::memcpy(x + kLanes, right + k * kLanes + kPlaneWords, sizeof(x) / 2);
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

// Adds the product of tiles whose operands are in the bucket's order.
template <bool PAIRS>
static inline void add_batch(const Batch& batch, float* bucket) {
  for_each_block<PAIRS>(batch, [&](int row_run, int col_run, const float* block) {
    float* to = bucket + row_run * kRows * kTile + col_run * kCols;
    for (int a = 0; a < kRows; a++)
      for (int j = 0; j < kCols; j++) to[a * kTile + j] += block[a * kCols + j];
  });
}

// Adds one tile whose operands are in its own order: its entries are scaled first.
template <bool PAIRS>
static inline void add_scaled(const LinearSketch& job, const Tile& tile, int64_t row, int64_t col,
                              const Batch& batch) {
  for_each_block<PAIRS>(batch, [&](int row_run, int col_run, float* block) {
    scale_block(job, row + row_run * kRows, col + col_run * kCols, block);
    for (int a = 0; a < kRows; a++) {
      uint64_t signs;
      float* to = bucket_row(tile, row_run * kRows + a, signs);
      add_run<kCols>(block + a * kCols, col_run * kCols, tile.col_mask, signs, to);
    }
  });
}

// Groups of tiles top .. bottom - 1 down and left .. right - 1 across.
struct Groups {
  int64_t top, bottom, left, right;
};

// Adds the tiles of some groups that go to one bucket.
template <bool PAIRS>
static inline void sketch_bucket(const LinearSketch& job, const Groups& groups, int64_t token,
                                 int64_t tokens, int64_t bucket, float* out, Batch& batch) {
  const int64_t bucket_row = bucket / job.group_cols, bucket_col = bucket % job.group_cols;
  const int64_t bottom = (job.first_row + job.dy.cols + kTile - 1) / kTile;
  const int64_t right = (job.first_col + job.x.cols + kTile - 1) / kTile;
  batch.count = 0;
  batch.words = 0;
  for (int64_t down = groups.top; down < groups.bottom; down++)
    for (int64_t across = groups.left; across < groups.right; across++) {
      const uint64_t deal = draw_deal(job, down, across);
      const int64_t strip =
          down * job.group_rows + dealt_back(bucket_row, deal >> 32, job.group_rows);
      const int64_t column =
          across * job.group_cols + dealt_back(bucket_col, deal & 0xFFFFFFFF, job.group_cols);
      if (strip < job.first_row / kTile || strip >= bottom || column < job.first_col / kTile ||
          column >= right)
        continue;
      const Tile tile = draw_tile(job, strip, column, out + bucket * kTile * kTile);
      const int64_t row = strip * kTile - job.first_row, col = column * kTile - job.first_col;
      if (job.scale) {
        append_tile<PAIRS>(job, token, tokens, {row, 0, 0}, {col, 0, 0}, batch);
        add_scaled<PAIRS>(job, tile, row, col, batch);
        batch.count = 0;
        batch.words = 0;
      } else {
        append_tile<PAIRS>(job, token, tokens, {row, tile.row_mask, tile.row_signs},
                           {col, tile.col_mask, tile.col_signs}, batch);
      }
    }
  if (batch.count) add_batch<PAIRS>(batch, out + bucket * kTile * kTile);
}

static inline int64_t divided_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Returns how many of `count` groups to take at a time, at most `most`: about equally many.
static inline int64_t even_share(int64_t count, int64_t most) {
  return divided_up(count, divided_up(count, most));
}

// Adds tokens token .. token + tokens - 1 of an example to the buckets of a part, rectangle of
// groups by rectangle, whose strips of dY and X stay in L2.
template <bool PAIRS>
static void sketch_tokens(const LinearSketch& job, int64_t token, int64_t tokens, int64_t part,
                          float* out, Batch& batch) {
  const int64_t p = job.group_rows, q = job.group_cols;
  const Groups all = {
      job.first_row / (p * kTile), divided_up(job.first_row + job.dy.cols, p * kTile),
      job.first_col / (q * kTile), divided_up(job.first_col + job.x.cols, q * kTile)};
  const int64_t most = kDepth / (PAIRS ? (tokens + 1) / 2 : tokens);
  const int64_t wide = even_share(all.right - all.left, most);
  const int64_t high = even_share(all.bottom - all.top, most / wide);
  for (int64_t left = all.left; left < all.right; left += wide)
    for (int64_t top = all.top; top < all.bottom; top += high) {
      const Groups some = {top, top + high < all.bottom ? top + high : all.bottom, left,
                           left + wide < all.right ? left + wide : all.right};
      for (int64_t bucket = 0; bucket < p * q; bucket++)
        if (owner_of(job, bucket) == part)
          sketch_bucket<PAIRS>(job, some, token, tokens, bucket, out, batch);
    }
}

template <bool PAIRS>
static void sketch_example(const LinearSketch& job, int64_t b, int64_t part) {
  Batch batch;
  const int64_t depth = PAIRS ? 2 * kDepth : kDepth;
  for (int64_t token = job.offsets[b]; token < job.offsets[b + 1]; token += depth) {
    const int64_t rest = job.offsets[b + 1] - token;
    sketch_tokens<PAIRS>(job, token, rest < depth ? rest : depth, part, job.out + b * job.proj_dim,
                         batch);
  }
}

// Parts own disjoint buckets, so threads share an example without a conflict, and the order of sums
// is always the same.
static void sketch_linear(const LinearSketch& job) {
#pragma omp parallel for schedule(dynamic) num_threads(job.threads)
  for (int64_t item = 0; item < job.examples * job.parts; item++) {
    if (kHasPairs && job.dy.bf16 && job.x.bf16)
      sketch_example<kHasPairs>(job, item / job.parts, item % job.parts);
    else
      sketch_example<false>(job, item / job.parts, item % job.parts);
  }
}
