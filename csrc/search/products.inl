// Inner products of rows with vectors. Column c of every product is added in lane c % 16; the lanes
// of a block of columns are added to those of the row, and these at the end by halves. This order
// is the same for every level, thread, row and vector, and so are the bits.

static const int kSums = 16;
static const int64_t kColumns = 1024;  // of a block
static const int64_t kRowTile = 16;    // rows that stay in L2 while all vectors pass
static const int kVectors = 4;         // vectors that pass at once

// A run of columns in one register, and the rows whose sums fit the registers for one vector and
// for kVectors of them.
#if defined(MERIT_AVX512)
static const int kRegister = 16, kRowsOfOne = 8, kRowsOfMany = 4;
#elif defined(MERIT_AVX2)
static const int kRegister = 8, kRowsOfOne = 4, kRowsOfMany = 1;
#else
static const int kRegister = 4, kRowsOfOne = 2, kRowsOfMany = 1;
#endif
typedef float Columns __attribute__((vector_size(kRegister * 4)));

struct Half {
  uint16_t bits;
};

struct Bf16 {
  uint16_t bits;
};

static inline float float_of(float x) { return x; }
static inline float float_of(Half x) { return half_to_float(x.bits); }
static inline float float_of(Bf16 x) { return widen(x.bits); }

template <class T>
static inline Columns load(const T* x) {
  Columns values;
  for (int i = 0; i < kRegister; i++) values[i] = float_of(x[i]);
  return values;
}

static inline Columns load(const float* x) {
  Columns values;
  std::memcpy(&values, x, sizeof values);
  return values;
}

#if defined(MERIT_AVX512)
static inline Columns load(const Half* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

static inline Columns load(const Bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#elif defined(MERIT_AVX2)
static inline Columns load(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

static inline Columns load(const Bf16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#endif

template <int ROWS, int VECTORS>
struct LaneSums {
  Columns lane[ROWS][VECTORS][kSums / kRegister];
};

// Adds the products of columns 0 .. count - 1, a multiple of kSums. Row r starts at
// rows + r * stride, vector v at vectors + v * width.
template <int ROWS, int VECTORS, class T>
static inline void add_columns(const T* rows, int64_t stride, const float* vectors, int64_t width,
                               int64_t count, LaneSums<ROWS, VECTORS>& totals) {
  LaneSums<ROWS, VECTORS> sums = {};
  for (int64_t c = 0; c < count; c += kSums)
    for (int part = 0; part < kSums / kRegister; part++) {
      const int64_t at = c + part * kRegister;
      Columns factors[VECTORS];
      for (int v = 0; v < VECTORS; v++) factors[v] = load(vectors + v * width + at);
      for (int r = 0; r < ROWS; r++) {
        const Columns values = load(rows + r * stride + at);
        for (int v = 0; v < VECTORS; v++) sums.lane[r][v][part] += values * factors[v];
      }
    }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++)
      for (int part = 0; part < kSums / kRegister; part++)
        totals.lane[r][v][part] += sums.lane[r][v][part];
}

// Adds the last columns, fewer than kSums, from copies that zeros fill up.
template <int ROWS, int VECTORS, class T>
static inline void add_rest(const T* rows, int64_t stride, const float* vectors, int64_t width,
                            int64_t count, LaneSums<ROWS, VECTORS>& totals) {
  float values[ROWS][kSums] = {}, factors[VECTORS][kSums] = {};
  for (int r = 0; r < ROWS; r++)
    for (int64_t c = 0; c < count; c++) values[r][c] = float_of(rows[r * stride + c]);
  for (int v = 0; v < VECTORS; v++)
    for (int64_t c = 0; c < count; c++) factors[v][c] = vectors[v * width + c];
  add_columns<ROWS, VECTORS>(values[0], kSums, factors[0], kSums, kSums, totals);
}

static inline float sum_of(const Columns* lanes) {
  float sums[kSums];
  std::memcpy(sums, lanes, sizeof sums);
  for (int half = kSums / 2; half; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
}

template <int ROWS, int VECTORS, class T>
static void multiply(const RowProducts& job, int64_t row, int64_t vector) {
  const T* rows = static_cast<const T*>(job.rows) + row * job.stride;
  const float* vectors = job.vectors + vector * job.width;
  LaneSums<ROWS, VECTORS> totals = {};
  const int64_t whole = job.width / kSums * kSums;
  for (int64_t c = 0; c < whole; c += kColumns) {
    const int64_t count = whole - c < kColumns ? whole - c : kColumns;
    add_columns<ROWS, VECTORS>(rows + c, job.stride, vectors + c, job.width, count, totals);
  }
  if (whole < job.width)
    add_rest<ROWS, VECTORS>(rows + whole, job.stride, vectors + whole, job.width, job.width - whole,
                            totals);
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++)
      job.out[(row + r) * job.num_vectors + vector + v] = sum_of(totals.lane[r][v]);
}

// Multiplies rows begin .. end - 1 with VECTORS vectors.
template <int ROWS, int VECTORS, class T>
static void multiply_rows(const RowProducts& job, int64_t begin, int64_t end, int64_t vector) {
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) multiply<ROWS, VECTORS, T>(job, row, vector);
  for (; row < end; row++) multiply<1, VECTORS, T>(job, row, vector);
}

template <class T>
static void row_products_of(const RowProducts& job) {
  const int threads = useful_threads(job.count * job.width * job.num_vectors, job.threads);
  const int64_t tiles = (job.count + kRowTile - 1) / kRowTile;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t begin = tile * kRowTile;
    const int64_t end = begin + kRowTile < job.count ? begin + kRowTile : job.count;
    int64_t vector = 0;
    for (; vector + kVectors <= job.num_vectors; vector += kVectors)
      multiply_rows<kRowsOfMany, kVectors, T>(job, begin, end, vector);
    for (; vector < job.num_vectors; vector++)
      multiply_rows<kRowsOfOne, 1, T>(job, begin, end, vector);
  }
}

static void row_products(const RowProducts& job) {
  if (job.type == DType::F16) return row_products_of<Half>(job);
  job.type == DType::BF16 ? row_products_of<Bf16>(job) : row_products_of<float>(job);
}
