// Sketch of gradients that exist, row by row.

// Adds the columns of row `row` of the parameter that lie in one tile. A run that is whole and
// unscaled is read in place, any other from a copy.
template <class T>
static inline void add_tile_row(const SketchRows& job, const T* x, int64_t row, int64_t at,
                                const Tile& tile) {
  uint64_t signs;
  float* to = bucket_row(tile, int(row % kTile), signs);
  if (at >= 0 && at + kTile <= job.x.cols && !job.scale)
    return add_run<kTile>(x + at, 0, tile.col_mask, signs, to);
  const int first = at < 0 ? int(-at) : 0;
  const int last = at + kTile > job.x.cols ? int(job.x.cols - at) : kTile;
  alignas(64) float copy[kTile] = {};
  const float* scale =
      job.scale ? job.scale + (row - job.first_row) * job.scale_stride + at : nullptr;
  for (int j = first; j < last; j++) copy[j] = value_of(x[at + j]) * (scale ? scale[j] : 1.f);
  add_run<kTile>(copy, 0, tile.col_mask, signs, to);
}

// Adds rows begin .. end - 1 of x, all of one strip, tile by tile, so that a bucket stays in L1.
// Prefetches only the rows of the next tile, since more would evict the bucket.
template <class T>
static inline void add_strip(const SketchRows& job, int64_t begin, int64_t end, int64_t row,
                             const Strip& strip) {
  const T* x = static_cast<const T*>(job.x.data);
  for (int k = 0; k < strip.count; k++) {
    const int64_t at = strip.column[k] - job.first_col;
    const int64_t next = k + 1 < strip.count ? strip.column[k + 1] - job.first_col : at;
    for (int64_t n = begin; n < end; n++) {
      const T* from = x + n * job.x.row_stride;
      for (int line = 0; line < kTile; line += 64 / int(sizeof(T)))
        __builtin_prefetch(from + next + line);
      add_tile_row(job, from, row + n - begin, at, strip.tiles[k]);
    }
  }
}

template <class T>
static void sketch_part(const SketchRows& job, int64_t b, int part) {
  float* out = job.out + b * job.proj_dim;
  const int64_t begin = job.offsets[b], end = job.offsets[b + 1];
  const int64_t left = job.first_col / kTile;
  const int64_t right = (job.first_col + job.x.cols + kTile - 1) / kTile;
  Strip strip;
  for (int64_t n = begin; n < end;) {
    const int64_t row = job.row_ids ? job.row_ids[n] : job.first_row + n - begin;
    int64_t stop = n + 1;
    if (!job.row_ids) {
      stop = n + kTile - row % kTile;
      if (stop > end) stop = end;
    }
    for (int64_t from = left; from < right; from += kStrip) {
      draw_strip(job, row / kTile, from, from + kStrip < right ? from + kStrip : right, part, out,
                 strip);
      add_strip<T>(job, n, stop, row, strip);
    }
    n = stop;
  }
}

// Parts own disjoint buckets, so threads share an example without a conflict, and the order of sums
// is always the same.
static void sketch_rows(const SketchRows& job) {
#pragma omp parallel for schedule(dynamic) num_threads(job.threads)
  for (int64_t item = 0; item < job.examples * job.parts; item++) {
    if (job.x.bf16)
      sketch_part<uint16_t>(job, item / job.parts, int(item % job.parts));
    else
      sketch_part<float>(job, item / job.parts, int(item % job.parts));
  }
}
