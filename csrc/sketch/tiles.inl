// Tiles of the CountSketch: bucket, permutation and signs of each, and the addition of a run of
// columns.

static const int kTile = 64;

// Draw of the hash for one tile of 64 x 64 entries.
struct Tile {
  float* bucket;  // 64 x 64 floats of the sketch
  uint32_t row_mask, col_mask;
  uint64_t row_signs, col_signs;  // a set bit means minus
};

// Returns the row of the tile's bucket to which row i goes, and the signs of its 64 columns.
static inline float* bucket_row(const Tile& tile, int i, uint64_t& signs) {
  signs = tile.col_signs ^ (0 - (tile.row_signs >> i & 1));
  return tile.bucket + (uint32_t(i) ^ tile.row_mask) * kTile;
}

static inline float flip(float value, uint64_t sign) {
  return as_float(as_bits(value) ^ uint32_t(sign & 1) << 31);
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

// row[j ^ col_mask] += sign_j * v[j - first] for COUNT columns of a tile from `first` on, both
// multiples of 16.
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

static const int kStrip = 64;  // tiles drawn at a time

// Tiles of one strip of 64 rows that one part owns; at most kStrip.
struct Strip {
  Tile tiles[kStrip];
  int64_t column[kStrip];  // first column of each tile in the parameter
  int count;
};

// Where the tiles of a strip go: columns of tiles, buckets, and the row mask's draw of the group.
struct Places {
  uint64_t column[kStrip], row_high[kStrip];
  uint32_t bucket[kStrip];
  int count;
};

// Returns the hash that deals the tiles of a group to the buckets.
static inline uint64_t draw_deal(const SketchTarget& job, int64_t group_row, int64_t group_col) {
  return splitmix64(job.key, uint64_t(8 * (group_row * job.groups + group_col) + 3));
}

// Returns which of `count` strips of a group a hash of 32 bits deals to row (column) `place` of the
// buckets.
static inline int64_t dealt_back(int64_t place, uint64_t hash, int64_t count) {
  const int64_t strip = place - int64_t(hash * uint64_t(count) >> 32);
  return strip < 0 ? strip + count : strip;
}

// Returns the part that owns a bucket. Neighbours across and down belong to different parts, so that
// work is even for few strips or columns too.
static inline int64_t owner_of(const SketchTarget& job, int64_t bucket) {
  const int64_t q = job.group_cols, row = bucket / q;
  return (row * q + (row + bucket) % q) % job.parts;
}

static inline Tile draw_tile(const SketchTarget& job, int64_t strip, int64_t column,
                             float* bucket) {
  const uint64_t across = uint64_t(job.all_cols + kTile - 1) / kTile;
  const uint64_t counter = 8 * (uint64_t(strip) * across + uint64_t(column));
  const uint64_t group_row = uint64_t(strip / job.group_rows);
  const uint64_t group_col = uint64_t(column / job.group_cols);
  const uint64_t masks = splitmix64(job.key, counter);
  const uint64_t row_high =
      splitmix64(job.key, 8 * (uint64_t(strip) * uint64_t(job.groups) + group_col) + 4);
  const uint64_t col_high = splitmix64(job.key, 8 * (group_row * across + uint64_t(column)) + 5);
  return {bucket, uint32_t((row_high & 56) | (masks & 7)),
          uint32_t((col_high & 56) | (masks >> 8 & 7)), splitmix64(job.key, counter + 1),
          splitmix64(job.key, counter + 2)};
}

// Returns whether parts own whole rows of buckets, and so need no strip of dY that goes to another
// row. Only where all rows get the same number of tiles.
static inline bool owns_rows(const LinearSketch& job) {
  const int64_t p = job.group_rows;
  return p % job.parts == 0 && job.first_row % (p * kTile) == 0 && job.dy.cols % (p * kTile) == 0;
}

static inline bool owns_rows(const SketchRows&) { return false; }

// Lists the strip's tiles in columns from .. to - 1 whose buckets belong to the part: whole rows of
// them, or else neighbours across and down belong to different parts, so that work is even for few
// strips or columns too. Without a branch: which tiles are owned cannot be predicted.
template <class Job>
static inline void find_places(const Job& job, uint64_t strip, uint64_t from, uint64_t to,
                               uint32_t part, Places& found) {
  const uint32_t p = uint32_t(job.group_rows), parts = uint32_t(job.parts);
  const uint32_t q = uint32_t(job.group_cols), row_in_group = uint32_t(strip) % p;
  const uint64_t group_row = uint32_t(strip) / p, groups = uint64_t(job.groups);
  const bool by_row = owns_rows(job);
  found.count = 0;
  for (uint64_t group = from ? from / q : 0, c = from; c < to; group++) {
    const uint64_t deal = splitmix64(job.key, 8 * (group_row * groups + group) + 3);
    const uint64_t row_high = splitmix64(job.key, 8 * (strip * groups + group) + 4);
    const uint32_t turned = row_in_group + uint32_t((deal >> 32) * p >> 32);
    const uint32_t row = turned < p ? turned : turned - p;
    uint32_t col = uint32_t(c - group * q) + uint32_t((deal & 0xFFFFFFFF) * q >> 32);
    if (col >= q) col -= q;
    const uint64_t end = (group + 1) * q < to ? (group + 1) * q : to;
    for (; c < end; c++, col = col + 1 < q ? col + 1 : 0) {
      const uint32_t diagonal = row + col < q ? row + col : row + col - q;
      found.column[found.count] = c;
      found.row_high[found.count] = row_high;
      found.bucket[found.count] = row * q + col;
      const uint32_t owner = by_row ? row / (p / parts) : (row * q + diagonal) % parts;
      found.count += owner == part;
    }
  }
}

// Draws the tiles of the strip in column tiles from .. to - 1 whose buckets belong to the part.
template <class Job>
static inline void draw_strip(const Job& job, int64_t strip_number, int64_t from, int64_t to,
                              int part, float* out, Strip& drawn) {
  const uint64_t strip = uint64_t(strip_number);
  const uint64_t across = uint64_t(job.all_cols + kTile - 1) / kTile;
  Places found;
  find_places(job, strip, uint64_t(from), uint64_t(to), uint32_t(part), found);
  drawn.count = found.count;
  const uint64_t first = strip * across,
                 first_high = uint32_t(strip) / uint32_t(job.group_rows) * across;
  for (int k = 0; k < found.count; k++) {
    const uint64_t counter = 8 * (first + found.column[k]);
    const uint64_t masks = splitmix64(job.key, counter);
    const uint64_t col_high = splitmix64(job.key, 8 * (first_high + found.column[k]) + 5);
    drawn.tiles[k] = {out + found.bucket[k] * uint64_t(kTile * kTile),
                      uint32_t((found.row_high[k] & 56) | (masks & 7)),
                      uint32_t((col_high & 56) | (masks >> 8 & 7)),
                      splitmix64(job.key, counter + 1), splitmix64(job.key, counter + 2)};
    drawn.column[k] = int64_t(found.column[k]) * kTile;
  }
}
