// Tiled CountSketch, hash version 2 (defined in kernels/sketch/__init__.py). Included inside a level's namespace.

static const int kTile = 64;

// What the hash draws for one tile of 64 x 64 entries.
struct Tile {
  float* bucket;  // its 64 x 64 floats of the sketch
  uint32_t row_mask, col_mask;
  uint64_t row_signs, col_signs;  // a set bit means minus
};

// Position in a parameter -> 64 random bits: the finalizer of SplitMix64 (Steele, Lea & Flood 2014).
static inline uint64_t hash_counter(uint64_t key, uint64_t counter) {
  uint64_t z = key + (counter + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Of every `buckets` tiles in a row each gets a bucket of its own, from a random one on.
static inline uint64_t bucket_of(uint64_t key, uint64_t tile, uint64_t buckets) {
  const uint64_t deal = hash_counter(key, 4 * (tile / buckets) + 3);
  return (tile + (((deal >> 32) * buckets) >> 32)) % buckets;
}

static inline Tile draw_tile(uint64_t key, uint64_t tile, uint64_t bucket, float* out) {
  const uint64_t masks = hash_counter(key, 4 * tile);
  return {out + bucket * kTile * kTile, uint32_t(masks & 63), uint32_t(masks >> 8 & 63),
          hash_counter(key, 4 * tile + 1), hash_counter(key, 4 * tile + 2)};
}

// The row of the tile's bucket that row i goes to, and the signs of its 64 columns.
static inline float* bucket_row(const Tile& tile, int i, uint64_t& signs) {
  signs = tile.col_signs ^ (0 - (tile.row_signs >> i & 1));
  return tile.bucket + (uint32_t(i) ^ tile.row_mask) * kTile;
}

static inline float flip(float value, uint64_t sign) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits ^= uint32_t(sign & 1) << 31;
  std::memcpy(&value, &bits, 4);
  return value;
}

#if defined(MERIT_AVX512)
static inline __m512 load16(const float* v) { return _mm512_loadu_ps(v); }
static inline __m512 load16(const uint16_t* v) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#elif defined(MERIT_AVX2)
static inline __m256 load8(const float* v) { return _mm256_loadu_ps(v); }
static inline __m256 load8(const uint16_t* v) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(v));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#endif

#if defined(MERIT_AVX512)
// row[j ^ col_mask] += sign_j * value[j - first] for 16 columns.
static inline void add16(__m512 value, int first, uint32_t col_mask, uint64_t signs, float* row) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i source = _mm512_xor_si512(lanes, _mm512_set1_epi32(int(col_mask & 15)));
  const __m512i bits = _mm512_castps_si512(value), minus = _mm512_set1_epi32(int(0x80000000u));
  const __m512i turned = _mm512_mask_xor_epi32(bits, __mmask16(signs >> first), bits, minus);
  const __m512 moved = _mm512_castsi512_ps(_mm512_permutexvar_epi32(source, turned));
  float* at = row + (uint32_t(first) ^ (col_mask & 48));
  _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), moved));
}
#endif

// row[j ^ col_mask] += sign_j * v[j - first] for the COUNT columns of a tile from `first` on, both multiples of 16.
template <int COUNT, class T>
static inline void add_run(const T* v, int first, uint32_t col_mask, uint64_t signs, float* row) {
#if defined(MERIT_AVX512)
  for (int j = first; j < first + COUNT; j += 16)
    add16(load16(v + (j - first)), j, col_mask, signs, row);
#elif defined(MERIT_AVX2)
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i source = _mm256_xor_si256(lanes, _mm256_set1_epi32(int(col_mask & 7)));
  const __m256i to_top_bit = _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31);
  const __m256i top_bit = _mm256_set1_epi32(int(0x80000000u));
  for (int j = first; j < first + COUNT; j += 8) {
    const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32(int(signs >> j)), to_top_bit);
    const __m256 minus = _mm256_castsi256_ps(_mm256_and_si256(bits, top_bit));
    const __m256 moved =
        _mm256_permutevar8x32_ps(_mm256_xor_ps(load8(v + (j - first)), minus), source);
    float* at = row + (uint32_t(j) ^ (col_mask & 56));
    _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), moved));
  }
#else
  for (int j = first; j < first + COUNT; j++)
    row[uint32_t(j) ^ col_mask] += flip(value_of(v[j - first]), signs >> j);
#endif
}

// Tiles of one strip of 64 rows, `count` <= kStrip from column tile `from` on, that part `part` of `parts` owns.
static const int kStrip = 64;
struct Strip {
  Tile tiles[kStrip];
  int64_t column[kStrip];  // of the parameter, where the tile begins
  int count;
};

template <class Job>
static inline void draw_strip(const Job& job, int64_t strip, int64_t from, int64_t to, int part,
                              float* out, Strip& drawn) {
  const uint64_t buckets = uint64_t(job.proj_dim / (kTile * kTile));
  const int64_t tiles = (job.all_cols + kTile - 1) / kTile;
  drawn.count = 0;
  for (int64_t c = from; c < to; c++) {
    const uint64_t tile = uint64_t(strip * tiles + c), bucket = bucket_of(job.key, tile, buckets);
    if (bucket % uint64_t(job.parts) != uint64_t(part)) continue;
    drawn.tiles[drawn.count] = draw_tile(job.key, tile, bucket, out);
    drawn.column[drawn.count++] = c * kTile;
  }
}

// The run of row `row` of the parameter in one tile: whole and unscaled from where it lies, else from a copy.
template <class T>
static inline void add_tile_row(const SketchRows& job, const T* x, int64_t row, int64_t at,
                                const Tile& tile) {
  uint64_t signs;
  float* to = bucket_row(tile, int(row % kTile), signs);
  if (at >= 0 && at + kTile <= job.x.cols && !job.scale)
    return add_run<kTile>(x + at, 0, tile.col_mask, signs, to);
  const int first = at < 0 ? int(-at) : 0,
            last = at + kTile > job.x.cols ? int(job.x.cols - at) : kTile;
  alignas(64) float copy[kTile] = {};
  const float* scale =
      job.scale ? job.scale + (row - job.first_row) * job.scale_stride + at : nullptr;
  for (int j = first; j < last; j++) copy[j] = value_of(x[at + j]) * (scale ? scale[j] : 1.f);
  add_run<kTile>(copy, 0, tile.col_mask, signs, to);
}

// Rows begin..end-1 of x, all of one strip, tile by tile: a bucket stays in L1, and the next tile's rows are asked for
// (those after it would push it out again).
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
  const int64_t left = job.first_col / kTile,
                right = (job.first_col + job.x.cols + kTile - 1) / kTile;
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

// Parts own disjoint buckets, so threads share an example without meeting and the sums' order is always the same.
void sketch_rows(const SketchRows& job) {
#pragma omp parallel for schedule(dynamic) num_threads(job.threads)
  for (int64_t item = 0; item < job.examples * job.parts; item++) {
    if (job.x.bf16)
      sketch_part<uint16_t>(job, item / job.parts, int(item % job.parts));
    else
      sketch_part<float>(job, item / job.parts, int(item % job.parts));
  }
}
