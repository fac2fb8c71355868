// CountSketch of dY^T X, which is never stored: blocks of products stay in registers. Where tokens
// are few, the tiles of a bucket are one product, whose reduction runs over tiles and tokens.

// Up to so many words of an example the tiles of a bucket are one product.
static const int64_t kFewFloats = 12, kFewPairs = 24;

// Appends the operands of one tile.
template <bool PAIRS>
static inline void append_tile(const LinearSketch& job, int64_t token, int64_t tokens,
                               const Side& row, const Side& col, Batch& batch) {
  const int64_t words = PAIRS ? (tokens + 1) / 2 : tokens;
  place<PAIRS>(job.dy, token, tokens, row, {batch.left + batch.words * kLanes, batch.plane});
  place<PAIRS>(job.x, token, tokens, col, {batch.right + batch.words * kLanes, batch.plane});
  const uint32_t rows = runs_inside(job.dy, row, kRows), cols = runs_inside(job.x, col, kCols);
  const int64_t end = batch.words + words;
  Segment* last = batch.segments + batch.count - 1;
  if (batch.count && last->rows == rows && last->cols == cols)
    last->to = end;
  else
    batch.segments[batch.count++] = {batch.words, end, rows, cols};
  batch.words = end;
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

// Adds a block of a tile to its bucket.
static inline __attribute__((always_inline)) void add_block(const Tile& tile, int row_run,
                                                            int col_run, const float* block) {
  for (int a = 0; a < kRows; a++) {
    uint64_t signs;
    float* to = bucket_row(tile, row_run * kRows + a, signs);
    add_run<kCols>(block + a * kCols, col_run * kCols, tile.col_mask, signs, to);
  }
}

// Adds one tile whose operands are in its own order; scales its entries first. Without a scale the
// blocks come from registers.
template <bool PAIRS>
static inline void add_tile(const LinearSketch& job, const Tile& tile, int64_t row, int64_t col,
                            const Batch& batch) {
  if (!job.scale)
    return for_each_block<PAIRS>(batch, [&](int row_run, int col_run, const float* block) {
      add_block(tile, row_run, col_run, block);
    });
  for_each_block<PAIRS>(batch, [&](int row_run, int col_run, float* block) {
    scale_block(job, row + row_run * kRows, col + col_run * kCols, block);
    add_block(tile, row_run, col_run, block);
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
      append_tile<PAIRS>(job, token, tokens, {row, tile.row_mask, tile.row_signs},
                         {col, tile.col_mask, tile.col_signs}, batch);
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
static void sketch_by_bucket(const LinearSketch& job, int64_t token, int64_t tokens, int64_t part,
                             float* out, Batch& batch) {
  batch.plane = kDepth * kLanes;
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

// Adds all strips of 64 rows times the column tiles from .. to - 1, whose operands are in `panel`.
template <bool PAIRS>
static inline void sketch_panel(const LinearSketch& job, int64_t token, int64_t tokens,
                                int64_t from, int64_t to, int part, float* out, uint32_t* panel,
                                Batch& batch) {
  const int64_t bottom = divided_up(job.first_row + job.dy.cols, kTile);
  batch.count = 1;
  Strip strip;
  for (int64_t s = job.first_row / kTile; s < bottom; s++) {
    draw_strip(job, s, from, to, part, out, strip);
    if (!strip.count) continue;
    const Side row = {s * kTile - job.first_row, 0, 0};
    place<PAIRS>(job.dy, token, tokens, row, {batch.left, batch.plane});
    for (int k = 0; k < strip.count; k++) {
      const Side col = {strip.column[k] - job.first_col, 0, 0};
      batch.right = panel + (strip.column[k] / kTile - from) * kPlanes * batch.plane;
      batch.segments[0] = {0, batch.words, runs_inside(job.dy, row, kRows),
                           runs_inside(job.x, col, kCols)};
      add_tile<PAIRS>(job, strip.tiles[k], row.at, col.at, batch);
    }
  }
}

// Writes the operands of column tiles from .. to - 1 of X. Takes some tokens of all tiles at a time,
// which lie close together.
template <bool PAIRS>
static inline void place_panel(const LinearSketch& job, int64_t token, int64_t tokens, int64_t from,
                               int64_t to, uint32_t* panel) {
  const int64_t step = PAIRS ? 2 : 1, words = (tokens + step - 1) / step, some = 16;
  for (int64_t k = 0; k < words; k += some)
    for (int64_t column = from; column < to; column++) {
      const int64_t rest = tokens - k * step;
      uint32_t* out = panel + ((column - from) * kPlanes * words + k) * kLanes;
      place<PAIRS>(job.x, token + k * step, rest < some * step ? rest : some * step,
                   {column * kTile - job.first_col, 0, 0}, {out, words * kLanes});
    }
}

// Returns where a panel ends that begins at column tile `from`: between groups where that spares
// the part strips of dY.
static inline int64_t panel_end(const LinearSketch& job, int64_t from, int64_t to, int64_t right) {
  const int64_t q = job.group_cols;
  if (to >= right) return right;
  return job.parts > 1 && owns_rows(job) && to / q * q > from ? to / q * q : to;
}

// Adds tokens token .. token + tokens - 1 of an example tile by tile. Operands serve all tiles of a
// strip: less work than in the order of each tile, if tokens are many.
template <bool PAIRS>
static void sketch_by_tile(const LinearSketch& job, int64_t token, int64_t tokens, int part,
                           float* out, Batch& batch) {
  const int64_t right = divided_up(job.first_col + job.x.cols, kTile);
  uint32_t* panel = batch.right;
  batch.words = PAIRS ? (tokens + 1) / 2 : tokens;
  batch.plane = batch.words * kLanes;
  const int64_t most = kPanelWords / (kPlanes * batch.plane);
  const int64_t wide = most < kStrip ? most : kStrip;
  for (int64_t from = job.first_col / kTile, to; from < right; from = to) {
    to = panel_end(job, from, from + wide, right);
    place_panel<PAIRS>(job, token, tokens, from, to, panel);
    sketch_panel<PAIRS>(job, token, tokens, from, to, part, out, panel, batch);
  }
  batch.right = panel;
}

template <bool PAIRS>
static void sketch_example(const LinearSketch& job, int64_t b, int part) {
  uint32_t* scratch = linear_scratch();
  Batch batch;
  batch.left = scratch;
  batch.right = scratch + kTile * kDepth;
  float* out = job.out + b * job.proj_dim;
  const int64_t step = PAIRS ? 2 : 1;
  for (int64_t token = job.offsets[b]; token < job.offsets[b + 1]; token += step * kDepth) {
    const int64_t rest = job.offsets[b + 1] - token;
    const int64_t tokens = rest < step * kDepth ? rest : step * kDepth;
    if (tokens <= (PAIRS ? 2 * kFewPairs : kFewFloats) && !job.scale)
      sketch_by_bucket<PAIRS>(job, token, tokens, part, out, batch);
    else
      sketch_by_tile<PAIRS>(job, token, tokens, part, out, batch);
  }
}

// Parts own disjoint buckets, so threads share an example without a conflict, and the order of sums
// is always the same.
static void sketch_linear(const LinearSketch& job) {
#pragma omp parallel for schedule(dynamic) num_threads(job.threads)
  for (int64_t item = 0; item < job.examples * job.parts; item++) {
    if (kHasPairs && job.dy.bf16 && job.x.bf16)
      sketch_example<kHasPairs>(job, item / job.parts, int(item % job.parts));
    else
      sketch_example<false>(job, item / job.parts, int(item % job.parts));
  }
}
