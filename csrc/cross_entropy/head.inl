// Both passes of a bf16 head. A thread takes a chunk of words: their logits lie by word, so that a
// vector holds 16 tokens. Sums run over chunks in order: no bit depends on the number of threads.

static const int kHeadWords = 64;    // of a chunk
static const int kHeadChunks = 16;   // of a tile, between two barriers
static const int kHeadColumns = 48;  // of a panel of columns: kVectors vectors
static const int kStateRows = 6;
static const int kHeadTokens = 16;  // tokens of a vector

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Writes the products of n words from word `word` on to z [n, rows]; those that are kept are
// rounded, and read again by the backward pass.
static void chunk_products(const HeadPass& job, int64_t word, int n, bool read_kept, float* z) {
  const bool keeps = word + n <= job.kept_words;
  uint16_t* kept = keeps ? job.kept + word * job.rows : nullptr;
  const int64_t numbers = n * job.rows;
  if (!keeps || !read_kept) {
    const LeftFactor words{job.weight + word * job.width, job.width, 2};
    for (int64_t m = 0; m < job.rows; m += kHeadColumns) {
      const RightFactor tokens{job.hidden + 2 * m, 2 * job.rows};
      product(
          words, tokens, n, smaller(kHeadColumns, job.rows - m), job.width / 2, no_start,
          [&](int64_t r, int c, __m512 sum) { _mm512_storeu_ps(z + r * job.rows + m + c, sum); });
    }
    if (keeps)
      for (int64_t j = 0; j < numbers; j++) kept[j] = rounded_to<uint16_t>(z[j]);
  }
  if (keeps)
    for (int64_t j = 0; j < numbers; j++) z[j] = widen(kept[j]);
}

// Turns the products of 16 tokens with a word into logits, and gives the slope of the softcap.
template <bool Slope>
static inline void logits_of(const HeadPass& job, int64_t word, float* z, float* slope) {
  const float bias = job.bias ? job.bias[word] : 0.f;
  for (int j = 0; j < kHeadTokens; j++) z[j] = (z[j] + bias) * job.scale;
  if (job.softcap > 0.f) {
    const float cap = job.softcap, inverse = 1.f / cap;
    if (Slope)
      for (int j = 0; j < kHeadTokens; j++) slope[j] = tanh_slope(z[j] * inverse);
    for (int j = 0; j < kHeadTokens; j++) z[j] = cap * tanh_of(z[j] * inverse);
  }
  for (int j = 0; j < kHeadTokens; j++) z[j] *= job.sharpness;
}

// Fills the part [6, rows] of a chunk for 16 tokens: the state of its words only. Products z
// [n, rows] become logits.
template <bool Statistics>
static void chunk_state(const HeadForward& job, int64_t word, int n, float* z, float* part) {
  const float low = as_float(0xff800000u);
  float top[kHeadTokens], shift[kHeadTokens], sum[kHeadTokens] = {}, plain[kHeadTokens] = {},
                                              weighted[kHeadTokens] = {};
  for (int j = 0; j < kHeadTokens; j++) top[j] = low;
  for (int v = 0; v < n; v++) {
    float row[kHeadTokens];
    std::memcpy(row, z + v * job.rows, sizeof row);
    logits_of<false>(job, word + v, row, nullptr);
    for (int j = 0; j < kHeadTokens; j++) top[j] = row[j] > top[j] ? row[j] : top[j];
    std::memcpy(z + v * job.rows, row, sizeof row);
  }
  for (int j = 0; j < kHeadTokens; j++) shift[j] = top[j] == low ? 0.f : top[j];
  for (int v = 0; v < n; v++) {
    const float* row = z + v * job.rows;
    for (int j = 0; j < kHeadTokens; j++) {
      const float x = row[j] - shift[j], power = exp_of(x);
      sum[j] += power;
      plain[j] += row[j];
      if (Statistics) weighted[j] += exponent_of(x) * power;
    }
  }
  std::memcpy(part, top, sizeof top);
  std::memcpy(part + job.rows, sum, sizeof sum);
  std::memcpy(part + 3 * job.rows, plain, sizeof plain);
  std::memcpy(part + 4 * job.rows, weighted, sizeof weighted);
}

// Adds the label's logit and the maximum before the label to the part of a chunk.
static void chunk_labels(const HeadForward& job, int64_t word, int n, const float* z, float* part) {
  const float low = as_float(0xff800000u);
  float *target = part + 2 * job.rows, *before = part + 5 * job.rows;
  for (int64_t m = 0; m < job.tokens; m++) {
    const int64_t label = job.labels[m] - job.first - word;
    target[m] = label >= 0 && label < n ? z[label * job.rows + m] : 0.f;
    before[m] = label >= n ? part[m] : low;
    for (int64_t v = 0; v < label && label < n; v++)
      before[m] = z[v * job.rows + m] > before[m] ? z[v * job.rows + m] : before[m];
  }
}

// Adds a chunk's part to the state of a token.
static inline void add_part(const HeadForward& job, int64_t m, const float* part) {
  double* state = job.state + m;
  const auto of = [&](int k) -> double& { return state[k * job.stride]; };
  const double high = double(part[m]), sum = double(part[job.rows + m]);
  if (high > of(0)) {
    const double decay = std::exp(of(0) - high);
    if (job.statistics && of(1) > 0.) of(4) = (of(4) + of(1) * (of(0) - high)) * decay;
    of(1) *= decay;
    of(0) = high;
  }
  if (sum != 0.) {
    const double drop = high - of(0), decay = std::exp(drop);
    of(1) += sum * decay;
    if (job.statistics) of(4) += (double(part[4 * job.rows + m]) + sum * drop) * decay;
  }
  of(2) += double(part[2 * job.rows + m]);
  of(3) += double(part[3 * job.rows + m]);
  if (job.statistics) of(5) = std::fmax(of(5), double(part[5 * job.rows + m]));
}

static void head_forward(const HeadForward& job) {
  const int64_t part = kStateRows * job.rows, chunks = (job.words + kHeadWords - 1) / kHeadWords;
  std::vector<float> parts(kHeadChunks * part);
#pragma omp parallel num_threads(job.threads)
  {
    std::vector<float> z(kHeadWords * job.rows);
    for (int64_t tile = 0; tile < chunks; tile += kHeadChunks) {
      const int64_t last = smaller(chunks, tile + kHeadChunks);
#pragma omp for schedule(dynamic)
      for (int64_t chunk = tile; chunk < last; chunk++) {
        const int64_t word = chunk * kHeadWords;
        const int n = int(smaller(kHeadWords, job.words - word));
        chunk_products(job, word, n, false, z.data());
        float* own = parts.data() + (chunk - tile) * part;
        for (int64_t m = 0; m < job.rows; m += kHeadTokens)
          job.statistics ? chunk_state<true>(job, word, n, z.data() + m, own + m)
                         : chunk_state<false>(job, word, n, z.data() + m, own + m);
        chunk_labels(job, word, n, z.data(), own);
      }
#pragma omp for schedule(static)
      for (int64_t m = 0; m < job.tokens; m++)
        for (int64_t chunk = tile; chunk < last; chunk++)
          add_part(job, m, parts.data() + (chunk - tile) * part);
    }
  }
}

// What the gradient needs of 16 tokens: their terms, and their labels among the words here or -1.
struct TokenTerms {
  float shift[kHeadTokens], factor[kHeadTokens], target[kHeadTokens], uniform[kHeadTokens],
      linear[kHeadTokens];
  int32_t labels[kHeadTokens];
};

static inline TokenTerms terms_of(const HeadBackward& job, int64_t m) {
  TokenTerms terms;
  const float* from = job.terms + m;
  float* const to[] = {terms.shift, terms.factor, terms.target, terms.uniform, terms.linear};
  for (int k = 0; k < 5; k++) std::memcpy(to[k], from + k * job.rows, sizeof terms.shift);
  for (int j = 0; j < kHeadTokens; j++) {
    const int64_t label = m + j < job.tokens ? job.labels[m + j] - job.first : -1;
    terms.labels[j] = label >= 0 && label < job.words ? int32_t(label) : -1;
  }
  return terms;
}

// The gradient of the products of 16 tokens with a word.
static inline void gradient_of(const HeadBackward& job, int64_t word, const TokenTerms& terms,
                               const float* products, float* d) {
  const float slope_of_factors = job.scale * job.sharpness;
  const int32_t local = int32_t(word);
  float z[kHeadTokens], slope[kHeadTokens];
  for (int j = 0; j < kHeadTokens; j++) slope[j] = 1.f;
  std::memcpy(z, products, sizeof z);
  logits_of<true>(job, word, z, slope);
  for (int j = 0; j < kHeadTokens; j++) {
    const float x = exponent_of(z[j] - terms.shift[j]);
    const float target = terms.labels[j] == local ? terms.target[j] : 0.f;
    const float plain = (terms.factor[j] + terms.linear[j] * x) * exp_of(x) - terms.uniform[j];
    d[j] = (plain - target) * (slope[j] * slope_of_factors);
  }
}

// Buffers of a tile's gradients that threads share.
struct HeadTile {
  uint16_t* by_words;  // [kHeadChunks * kHeadWords / 2, rows, 2]: d in pairs of neighbouring words
  uint16_t* weight;  // [panels, kHeadChunks * kHeadWords / 2, kHeadColumns, 2]: W in pairs of words
};

// Turns the products z [n, rows] of 16 tokens into their gradient; writes it rounded, by words and
// in pairs of words.
static void chunk_gradient(const HeadBackward& job, const HeadTile& tile, int64_t word,
                           int64_t pair, int n, int64_t m, float* z, uint16_t* by_tokens) {
  const TokenTerms terms = terms_of(job, m);
  for (int v = 0; v < n; v += 2) {
    __m512i words = _mm512_setzero_si512();
    for (int k = 0; k < 2 && v + k < n; k++) {
      float d[kHeadTokens];
      const int64_t at = (v + k) * job.rows + m;
      gradient_of(job, word + v + k, terms, z + at, d);
      const __m512 wide = _mm512_loadu_ps(d);
      const __m256i rounded = bf16_of(wide);
      _mm512_storeu_ps(z + at, wide);
      _mm256_storeu_si256((__m256i*)(by_tokens + at), rounded);
      const __m512i half = _mm512_cvtepu16_epi32(rounded);
      words = _mm512_or_si512(words, k ? _mm512_slli_epi32(half, 16) : half);
    }
    _mm512_storeu_si512(tile.by_words + ((pair + v / 2) * job.rows + m) * 2, words);
  }
}

// Copies a chunk's rows of W to the tile, in pairs of words.
static void pair_weight(const HeadBackward& job, const HeadTile& tile, int64_t word, int64_t pair,
                        int n) {
  for (int v = 0; v < n; v += 2) {
    const uint16_t *even = job.weight + (word + v) * job.width, *odd = even + job.width;
    for (int64_t h = 0; h < job.width; h += 16) {
      const int64_t panel = h / kHeadColumns;
      uint16_t* out =
          tile.weight + ((panel * kHeadChunks * kHeadWords / 2 + pair + v / 2) * kHeadColumns +
                         (h - panel * kHeadColumns)) *
                            2;
      const auto wide = [&](const uint16_t* row) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(row + h)));
      };
      const __m512i second = v + 1 < n ? _mm512_slli_epi32(wide(odd), 16) : _mm512_setzero_si512();
      _mm512_storeu_si512(out, _mm512_or_si512(wide(even), second));
    }
  }
}

static void weight_gradient(const HeadBackward& job, int64_t word, int n,
                            const uint16_t* by_tokens) {
  const LeftFactor d{by_tokens, job.rows, 2};
  provide_pages(job.d_weight + word * job.width, 2 * n * job.width);
  for (int64_t h = 0; h < job.width; h += kHeadColumns) {
    const RightFactor tokens{job.token_pairs + 2 * h, 2 * job.width};
    product(d, tokens, n, smaller(kHeadColumns, job.width - h), job.rows / 2, no_start,
            [&](int64_t r, int c, __m512 sum) {
              uint16_t* out = job.d_weight + (word + r) * job.width + h + c;
              _mm256_storeu_si256((__m256i*)out, bf16_of(sum));
            });
  }
}

static void bias_gradient(const HeadBackward& job, int64_t word, int n, const float* z) {
  for (int v = 0; v < n; v++) {
    float lanes[16] = {}, sum = 0.f;
    for (int64_t m = 0; m < job.rows; m += 16)
      for (int j = 0; j < 16; j++) lanes[j] += z[v * job.rows + m + j];
    for (int j = 0; j < 16; j++) sum += lanes[j];
    job.d_bias[word + v] = sum;
  }
}

// Adds the product of a tile's d and W to a panel of columns of d_hidden.
static void hidden_gradient(const HeadBackward& job, const HeadTile& tile, int64_t panel,
                            int64_t pairs) {
  const int64_t h = panel * kHeadColumns;
  const LeftFactor d{tile.by_words, 2, 2 * job.rows};
  const RightFactor weight{tile.weight + panel * kHeadChunks * kHeadWords * kHeadColumns,
                           2 * kHeadColumns};
  float* out = job.d_hidden + h;
  product(
      d, weight, job.rows, smaller(kHeadColumns, job.width - h), pairs,
      [&](int64_t r, int c) { return _mm512_loadu_ps(out + r * job.width + c); },
      [&](int64_t r, int c, __m512 sum) { _mm512_storeu_ps(out + r * job.width + c, sum); });
}

static void head_backward(const HeadBackward& job) {
  const int64_t chunks = (job.words + kHeadWords - 1) / kHeadWords;
  const int64_t panels = (job.width + kHeadColumns - 1) / kHeadColumns;
  std::vector<uint16_t> by_words(kHeadChunks * kHeadWords * job.rows);
  std::vector<uint16_t> paired(panels * kHeadChunks * kHeadWords * kHeadColumns);
  const HeadTile shared{by_words.data(), paired.data()};
#pragma omp parallel num_threads(job.threads)
  {
    std::vector<float> z(kHeadWords * job.rows);
    std::vector<uint16_t> by_tokens(kHeadWords * job.rows);
    for (int64_t tile = 0; tile < chunks; tile += kHeadChunks) {
      const int64_t last = smaller(chunks, tile + kHeadChunks), first_word = tile * kHeadWords;
#pragma omp for schedule(dynamic)
      for (int64_t chunk = tile; chunk < last; chunk++) {
        const int64_t word = chunk * kHeadWords, pair = (word - first_word) / 2;
        const int n = int(smaller(kHeadWords, job.words - word));
        chunk_products(job, word, n, true, z.data());
        for (int64_t m = 0; m < job.rows; m += kHeadTokens)
          chunk_gradient(job, shared, word, pair, n, m, z.data(), by_tokens.data());
        if (job.d_bias) bias_gradient(job, word, n, z.data());
        if (job.d_weight) weight_gradient(job, word, n, by_tokens.data());
        if (job.d_hidden) pair_weight(job, shared, word, pair, n);
      }
      const int64_t words = smaller(job.words - first_word, kHeadChunks * kHeadWords);
#pragma omp for schedule(dynamic)
      for (int64_t panel = 0; panel < panels; panel++)
        if (job.d_hidden) hidden_gradient(job, shared, panel, (words + 1) / 2);
    }
  }
}

extern const HeadKernels head_kernels = {
    .forward = head_forward,
    .backward = head_backward,
};
