// The update of blocks with 8-bit moments.

// Asks for the memory of a later block: the processor looks ahead within a page of memory only.
static inline void prefetch_block(const AdamWJob& job, const AdamWTensor& t, int64_t from) {
  const auto ask = [from](const void* data, int bytes) {
    const char* start = static_cast<const char*>(data) + from * bytes;
    for (int i = 0; i < kMomentBlock * bytes; i += 64) __builtin_prefetch(start + i, 1);
  };
  ask(t.weight, job.weight_bf16 ? 2 : 4);
  ask(t.grad, job.grad_bf16 ? 2 : 4);
  ask(t.exp_avg, 1);
  ask(t.exp_avg_sq, 1);
  if (t.master) ask(t.master, job.master == Master::F32 ? 4 : job.master == Master::SPLIT ? 2 : 1);
}

// Up to kCodedChunk elements with 8-bit moments: the moments' new values, the weights, the codes.
// All blocks take a step before any takes the next one, so that one block's waits are filled by
// another's work.
struct CodedChunk {
  const AdamWJob& job;
  const AdamWTensor& t;
  const int64_t from;
  const int n;
  alignas(64) float m[kCodedChunk], roots[kCodedChunk];
  alignas(64) uint32_t draws[kCodedChunk];
  float m_tops[kCodedChunk / kMomentBlock], v_tops[kCodedChunk / kMomentBlock];

  CodedChunk(const AdamWJob& of, const AdamWTensor& tensor, int64_t first, int size)
      : job(of), t(tensor), from(first), n(size) {}

  // Of the block from element i of the chunk on.
  CodedMoments codes(int i) const {
    const int64_t block = (from + i) / kMomentBlock;
    return {at<int8_t>(t.exp_avg, from + i), at<uint8_t>(t.exp_avg_sq, from + i),
            t.exp_avg_scale + block, t.exp_avg_sq_scale + block};
  }
  BlockValues values(int i) { return {m + i, roots + i, draws + i}; }
  float& m_top(int i) { return m_tops[i / kMomentBlock]; }
  float& v_top(int i) { return v_tops[i / kMomentBlock]; }
  int size(int i) const { return n - i < kMomentBlock ? n - i : kMomentBlock; }
  Factors factors(int i) { return factors_of(values(i), m_top(i), v_top(i), size(i)); }

  template <class Grad>
  void update_moments(const Grad* grad) {
    const Numbers numbers(job, t);
    for (int i = 0; i < n; i += kMomentBlock) {
      prefetch_block(job, t, from + i + 2 * kMomentBlock);
      const Grad* const g = grad + from + i;
#if MERIT_AVX512
      if (size(i) == kMomentBlock) {
        update_moment_lanes(numbers, g, codes(i), values(i), m_top(i), v_top(i));
        continue;
      }
#endif
      update_coded(numbers, g, codes(i), values(i), size(i), m_top(i), v_top(i));
    }
  }

  bool update_weights(const Run& run, int before) {
    if (job.stochastic)
      for (int i = 0; i < run.n; i++) draws[before + i] = run.random.of_weight(i);
    return run.update_by(m + before, roots + before);
  }

  template <bool Stochastic>
  void encode() {
    for (int i = 0; i < n; i += kMomentBlock) {
#if MERIT_AVX512
      if (size(i) == kMomentBlock) {
        const uint32_t* const bits = draws + i;
        encode_lanes(values(i), factors(i), codes(i), [bits](int j) {
          return Stochastic ? shift_lanes(_mm512_load_si512(bits + j)) : no_shift();
        });
        continue;
      }
#endif
      encode_block<Stochastic>(values(i), factors(i), codes(i), size(i));
    }
  }

#if MERIT_AVX512
  // Whether the weights are of the kind, and the chunk of the shape, that finish_lanes takes.
  bool fits_lanes() {
    const int64_t place = (t.first + from) % kRandomBlock;
    bool fits = n % kMomentBlock == 0 && place + n <= kRandomBlock;
    fits = fits && job.stochastic && job.weight_bf16 && !t.average;
    fits = fits && (job.master == Master::NONE || job.master == Master::SPLIT8);
    for (int i = 0; i < n; i += kMomentBlock) fits = fits && !needs_lift(m_top(i));
    return fits;
  }

  // Updates the weights and writes the codes in one loop.
  void finish_lanes(const RandomTable& table) {
    const RandomRun random(table, uint64_t(t.first + from));
    for (int i = 0; i < n; i += kMomentBlock) {
      uint16_t* const weights = at<uint16_t>(t.weight, from + i);
      if (job.master == Master::NONE)
        finish_block_lanes(Bf16Lanes{weights}, random, i);
      else
        finish_block_lanes(Split8Lanes{weights, at<int8_t>(t.master, from + i)}, random, i);
    }
  }

  template <class Weights>
  void finish_block_lanes(const Weights& of, const RandomRun& random, int i) {
    const WeightLanes<Weights> weights(Numbers(job, t), of, values(i), random, i);
    encode_lanes(values(i), factors(i), codes(i),
                 [&](int j) { return shift_lanes(weights.update(j)); });
  }
#endif

  void finish_codes() {
    for (int i = 0; i < n; i += kMomentBlock) {
      const CodedMoments to = codes(i);
      finish_block(m_top(i), 127, to.m, to.m_scale, size(i));
      finish_block(v_top(i), 255, to.v, to.v_scale, size(i));
    }
  }
};

static bool update_weights_and_codes(CodedChunk& chunk, const RandomTable& table) {
#if MERIT_AVX512
  if (chunk.fits_lanes()) {
    chunk.finish_lanes(table);
    return false;
  }
#endif
  bool won = false;
  for_each_run(chunk.job, chunk.t, table, chunk.from, chunk.n,
               [&](const Run& run, int before) { won |= chunk.update_weights(run, before); });
  if (chunk.job.stochastic)
    chunk.encode<true>();
  else
    chunk.encode<false>();
  return won;
}

// Returns whether a weight won over its master. Out of line, where it would keep other loops from
// being compiled in line.
__attribute__((noinline)) static bool update_coded_chunk(const AdamWJob& job, const AdamWTensor& t,
                                                         const RandomTable& table, int64_t from,
                                                         int n) {
  CodedChunk chunk(job, t, from, n);
  if (job.grad_bf16)
    chunk.update_moments(static_cast<const uint16_t*>(t.grad));
  else
    chunk.update_moments(static_cast<const float*>(t.grad));
  const bool won = update_weights_and_codes(chunk, table);
  chunk.finish_codes();
  return won;
}
