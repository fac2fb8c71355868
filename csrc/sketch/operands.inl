// Operands of products: columns of dY or X as they lie, or in the order of a bucket and with the
// signs of a tile, so that the products of all tiles of a bucket add up in registers.

// Columns of a plane, one vector register.
static const int kLanes = 16;
static const int kPlanes = kTile / kLanes;

// Where an operand is written, or read: plane by plane [.., kLanes].
struct Operand {
  uint32_t* words;
  int64_t plane;  // words from one plane to the next
};

#if defined(MERIT_AVX512_BF16)
static const bool kHasPairs = true;
#else
static const bool kHasPairs = false;
#endif

// Columns of one side of a tile: column j of the tile goes to place j ^ mask, with its sign.
struct Side {
  int64_t at;  // the tile's first column in the matrix; may lie outside
  uint32_t mask;
  uint64_t signs;
};

static inline uint32_t word_of(float value) { return as_bits(value); }
static inline uint32_t word_of(uint16_t value) { return uint32_t(value) << 16; }

// Returns a bit for every column of the tile, from `at` on, that the matrix has.
static inline uint64_t columns_inside(const SketchMatrix& m, int64_t at) {
  uint64_t inside = ~uint64_t(0);
  if (at < 0) inside = at > -kTile ? inside << -at : 0;
  const int64_t rest = m.cols - at;
  if (rest < kTile) inside = rest > 0 ? inside & ~(~uint64_t(0) << rest) : 0;
  return inside;
}

#if defined(MERIT_AVX512)
// Fetches 64 columns of a row that comes some rows later.
template <class T>
static inline void fetch_ahead(const SketchMatrix& m, const T* columns) {
  const T* ahead = columns + 8 * m.row_stride;
  for (int j = 0; j < kTile; j += 64 / int(sizeof(T))) __builtin_prefetch(ahead + j);
}

// What moves 16 places of an operand: their columns, which of those exist, signs of the places.
struct Move {
  int64_t column;
  uint32_t inside;
  __m512i signs;
};

static inline __m512i lanes_xor(uint32_t mask) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_xor_si512(lanes, _mm512_set1_epi32(int(mask & 15)));
}

// Returns the moves of the places of each plane; `minus` is the sign bits of a word.
static inline void find_moves(const SketchMatrix& m, const Side& side, uint32_t minus,
                              Move* moves) {
  const uint64_t inside = columns_inside(m, side.at);
  const __m512i order = lanes_xor(side.mask);
  for (int plane = 0; plane < kPlanes; plane++) {
    const uint32_t first = uint32_t(plane * kLanes) ^ (side.mask & 48);
    const __m512i signs = _mm512_maskz_set1_epi32(__mmask16(side.signs >> first), int(minus));
    moves[plane] = {side.at + int64_t(first), uint32_t(inside >> first & 0xFFFF),
                    _mm512_permutexvar_epi32(order, signs)};
  }
}

static inline __m512i words16(const float* row, uint32_t inside) {
  return _mm512_maskz_loadu_epi32(__mmask16(inside), row);
}

static inline __m512i words16(const uint16_t* row, uint32_t inside) {
  const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16(inside), row);
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

// Writes the words of `tokens` rows from `row` on to out[plane][word][lane]. MOVES: not in the order
// in which they lie. The rows ahead are fetched: their stride hides them from the processor.
template <bool MOVES, class T>
static inline void place_rows(const SketchMatrix& m, const T* row, int64_t tokens, const Side& side,
                              Operand out) {
  Move moves[kPlanes];
  find_moves(m, side, 0x80000000u, moves);
  const __m512i order = lanes_xor(side.mask);
  for (int64_t k = 0; k < tokens; k++, row += m.row_stride, out.words += kLanes) {
    fetch_ahead(m, row + side.at);
    for (int plane = 0; plane < kPlanes; plane++) {
      __m512i words = words16(row + moves[plane].column, moves[plane].inside);
      if constexpr (MOVES)
        words = _mm512_xor_si512(_mm512_permutexvar_epi32(order, words), moves[plane].signs);
      _mm512_store_si512(out.words + plane * out.plane, words);
    }
  }
}

template <class T>
static inline void place_floats(const SketchMatrix& m, const T* row, int64_t tokens,
                                const Side& side, Operand out) {
  if (side.mask || side.signs) return place_rows<true>(m, row, tokens, side, out);
  place_rows<false>(m, row, tokens, side, out);
}

#if defined(MERIT_AVX512_BF16)
// Reads 32 columns of a row. A column whose bit is not set does not exist and reads as zero.
template <bool WHOLE>
static inline __m512i columns32(const uint16_t* row, uint32_t inside) {
  return WHOLE ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi16(inside, row);
}

// Writes the words of `tokens` rows as pairs of tokens. The last pair may lack its second token.
// WHOLE: all columns exist.
template <bool WHOLE>
static inline void place_pairs(const SketchMatrix& m, const uint16_t* row, int64_t tokens,
                               const Side& side, Operand out) {
  Move moves[kPlanes];
  find_moves(m, side, 0x80008000u, moves);
  const uint64_t inside = columns_inside(m, side.at);
  const __m512i lanes = lanes_xor(side.mask);
  const __m512i pairs =
      _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
  const __m512i swapped = _mm512_xor_si512(pairs, _mm512_set1_epi32(0x00100010));
  const __m512i even = side.mask & 16 ? swapped : pairs, odd = side.mask & 16 ? pairs : swapped;
  const int64_t first = side.at + int64_t(side.mask & 32), second = side.at + (~side.mask & 32);
  const uint32_t first_inside = uint32_t(inside >> (side.mask & 32)),
                 second_inside = uint32_t(inside >> (~side.mask & 32));
  for (int64_t k = 0; k < tokens; k += 2, row += 2 * m.row_stride, out.words += kLanes) {
    const uint16_t* next = row + m.row_stride;
    fetch_ahead(m, row + side.at);
    fetch_ahead(m, next + side.at);
    __m512i a = columns32<WHOLE>(row + first, first_inside), b = _mm512_setzero_si512();
    __m512i c = columns32<WHOLE>(row + second, second_inside), d = _mm512_setzero_si512();
    if (k + 1 < tokens) {
      b = columns32<WHOLE>(next + first, first_inside);
      d = columns32<WHOLE>(next + second, second_inside);
    }
    const __m512i words[kPlanes] = {
        _mm512_permutex2var_epi16(a, even, b), _mm512_permutex2var_epi16(a, odd, b),
        _mm512_permutex2var_epi16(c, even, d), _mm512_permutex2var_epi16(c, odd, d)};
    for (int plane = 0; plane < kPlanes; plane++)
      _mm512_store_si512(out.words + plane * out.plane,
                         _mm512_xor_si512(words[plane], moves[plane].signs));
  }
}
#endif
#else
// Writes the words of `tokens` rows from `row` on to out[plane][word][lane].
template <class T>
static inline void place_floats(const SketchMatrix& m, const T* row, int64_t tokens,
                                const Side& side, Operand out) {
  const uint64_t inside = columns_inside(m, side.at);
  if (!side.mask && !side.signs && inside == ~uint64_t(0)) {
    for (int64_t k = 0; k < tokens; k++, row += m.row_stride, out.words += kLanes)
      for (int plane = 0; plane < kPlanes; plane++)
        for (int j = 0; j < kLanes; j++)
          out.words[plane * out.plane + j] = word_of(row[side.at + plane * kLanes + j]);
    return;
  }
  alignas(32) uint32_t minus[kTile];
  for (int place = 0; place < kTile; place++)
    minus[place] = uint32_t(side.signs >> (uint32_t(place) ^ side.mask) & 1) << 31;
#if defined(MERIT_AVX2)
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i order = _mm256_xor_si256(lanes, _mm256_set1_epi32(int(side.mask & 7)));
#endif
  for (int64_t k = 0; k < tokens; k++, row += m.row_stride, out.words += kLanes) {
    alignas(32) uint32_t words[kTile] = {};
    if (inside == ~uint64_t(0)) {
      for (int j = 0; j < kTile; j++) words[j] = word_of(row[side.at + j]);
    } else {
      for (int j = 0; j < kTile; j++)
        if (inside >> j & 1) words[j] = word_of(row[side.at + j]);
    }
#if defined(MERIT_AVX2)
    for (int place = 0; place < kTile; place += 8) {
      const uint32_t* from = words + (uint32_t(place) ^ (side.mask & 56));
      const __m256i given = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i signs = _mm256_load_si256(reinterpret_cast<const __m256i*>(minus + place));
      const __m256i moved = _mm256_permutevar8x32_epi32(given, order);
      uint32_t* to = out.words + place / kLanes * out.plane + place % kLanes;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(moved, signs));
    }
#else
    for (int place = 0; place < kTile; place++)
      out.words[place / kLanes * out.plane + place % kLanes] =
          words[uint32_t(place) ^ side.mask] ^ minus[place];
#endif
  }
}
#endif

// Writes the words of one side of a tile: floats, or pairs of tokens in bf16.
template <bool PAIRS>
static inline void place(const SketchMatrix& m, int64_t token, int64_t tokens, const Side& side,
                         Operand out) {
  const int64_t first = token * m.row_stride;
#if defined(MERIT_AVX512_BF16)
  if constexpr (PAIRS) {
    const uint16_t* row = static_cast<const uint16_t*>(m.data) + first;
    if (columns_inside(m, side.at) == ~uint64_t(0))
      return place_pairs<true>(m, row, tokens, side, out);
    return place_pairs<false>(m, row, tokens, side, out);
  }
#endif
  if (m.bf16)
    place_floats(m, static_cast<const uint16_t*>(m.data) + first, tokens, side, out);
  else
    place_floats(m, static_cast<const float*>(m.data) + first, tokens, side, out);
}
