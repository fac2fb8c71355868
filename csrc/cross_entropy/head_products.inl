// Products of bf16 matrices in registers: R rows of the left factor, C vectors of the right one.

static const int kLeftRows = 8;  // of the left factor in registers
static const int kVectors = 3;   // of 16 columns of the right one

// A factor in pairs along the sum: element (row, pair) of the left one lies at row * step + pair *
// pair_step, 16 columns of a pair of the right one are 32 values in order.
struct LeftFactor {
  const uint16_t* values;
  int64_t step, pair_step;
};
struct RightFactor {
  const uint16_t* values;
  int64_t pair_step;
};

template <int R, int C>
static inline void multiply(const LeftFactor& a, const RightFactor& b, int64_t pairs,
                            __m512 (&sums)[R][C]) {
  for (int64_t k = 0; k < pairs; k++) {
    __m512bh right[C];
    for (int c = 0; c < C; c++)
      right[c] = (__m512bh)_mm512_loadu_si512(b.values + k * b.pair_step + 32 * c);
    for (int r = 0; r < R; r++) {
      int32_t pair;
      std::memcpy(&pair, a.values + r * a.step + k * a.pair_step, 4);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
      for (int c = 0; c < C; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], left, right[c]);
    }
  }
}

// Calls finish(row, column, sum) for each vector of 16 sums of a block of R rows and C vectors.
// `start(row, column)` gives the vector to which the products are added.
template <int R, int C, class Start, class Finish>
static inline void block_product(const LeftFactor& a, const RightFactor& b, int64_t pairs,
                                 const Start& start, const Finish& finish) {
  __m512 sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = start(r, 16 * c);
  multiply<R, C>(a, b, pairs, sums);
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) finish(r, 16 * c, sums[r][c]);
}

template <int C, class Start, class Finish>
static inline void rows_product(LeftFactor a, const RightFactor& b, int64_t rows, int64_t pairs,
                                const Start& start, const Finish& finish) {
  const auto at = [&](int64_t first) {
    LeftFactor part = a;
    part.values += first * a.step;
    return part;
  };
  int64_t row = 0;
  for (; row + kLeftRows <= rows; row += kLeftRows)
    block_product<kLeftRows, C>(
        at(row), b, pairs, [&](int r, int c) { return start(row + r, c); },
        [&](int r, int c, __m512 sum) { finish(row + r, c, sum); });
  for (; row < rows; row++)
    block_product<1, C>(
        at(row), b, pairs, [&](int, int c) { return start(row, c); },
        [&](int, int c, __m512 sum) { finish(row, c, sum); });
}

// The product of `rows` rows and of 1, 2 or 3 vectors of columns.
template <class Start, class Finish>
static inline void product(const LeftFactor& a, const RightFactor& b, int64_t rows, int64_t columns,
                           int64_t pairs, const Start& start, const Finish& finish) {
  if (columns == 48)
    rows_product<3>(a, b, rows, pairs, start, finish);
  else if (columns == 32)
    rows_product<2>(a, b, rows, pairs, start, finish);
  else
    rows_product<1>(a, b, rows, pairs, start, finish);
}

static inline __m512 no_start(int64_t, int) { return _mm512_setzero_ps(); }

static inline __m256i bf16_of(__m512 sum) { return (__m256i)_mm512_cvtneps_pbh(sum); }
