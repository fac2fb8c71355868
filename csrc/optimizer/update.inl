// The update of a run of elements in one loop, and the choice of the loop for each kind of tensor.

// Returns bits other than 0 if a weight won over its master. No two arrays overlap, which the
// compiler is told. Square roots vectorize because of -fno-math-errno.
template <class Grad, class Weight, class Moments>
static uint32_t update_run(const Numbers& x, const Grad* grad, const Weight weight,
                           const Moments moments, int n) {
  const Numbers local = x;  // no store makes the compiler read it again
  uint32_t won = 0;
#pragma GCC ivdep
  for (int i = 0; i < n; i++) {
    const auto [first, second] =
        local.moved(value_of(grad[i]), moments.first(i), moments.second(i));
    const float size = std::sqrt(second);
    const float w = weight.load(i, won);
    moments.store(i, first, second);
    weight.store(i, w * local.decay - local.rate * (first / (size * local.root + local.epsilon)));
  }
  return won;
}

// The weights' part of update_run, for moments whose new values and roots are known.
template <class Weight>
static uint32_t update_weights(const Numbers& x, const Weight weight, const float* __restrict first,
                               const float* __restrict size, int n) {
  const float decay = x.decay, root = x.root, epsilon = x.epsilon, rate = x.rate;
  uint32_t won = 0;
#pragma GCC ivdep
  for (int i = 0; i < n; i++)
    weight.store(i, weight.load(i, won) * decay - rate * (first[i] / (size[i] * root + epsilon)));
  return won;
}

template <class Weight>
static void average_run(const Weight weight, float* __restrict average, float share, int n) {
  uint32_t won = 0;
#pragma GCC ivdep
  for (int i = 0; i < n; i++) average[i] += (weight.load(i, won) - average[i]) * share;
}

// Up to kUpdateChunk elements of a tensor, in one block of random bits.
struct Run {
  const AdamWJob& job;
  const AdamWTensor& t;
  int64_t from;
  int n;
  RandomRun random;

  // Calls body with the weights as the kind that they are.
  template <class Body>
  void with_weight(const Body& body) const {
    uint16_t* const half = at<uint16_t>(t.weight, from);
    if (!job.weight_bf16)
      body(FloatWeight{at<float>(t.weight, from)});
    else if (job.master == Master::F32)
      body(FloatMaster{half, at<float>(t.master, from)});
    else if (job.master == Master::SPLIT)
      body(SplitMaster{half, at<int16_t>(t.master, from)});
    else if (job.master == Master::SPLIT8 && job.stochastic)
      body(Split8Master<true>{half, at<int8_t>(t.master, from), random});
    else if (job.master == Master::SPLIT8)
      body(Split8Master<false>{half, at<int8_t>(t.master, from), random});
    else if (job.stochastic)
      body(Bf16Weight<true>{half, random});
    else
      body(Bf16Weight<false>{half, random});
  }

  // Returns whether a weight won over its master.
  template <class MomentsOfKind>
  bool update(const MomentsOfKind& moments) const {
    const Numbers numbers(job, t);
    uint32_t won = 0;
    with_weight([&](const auto& weight) {
      if (job.grad_bf16)
        won = update_run(numbers, at<uint16_t>(t.grad, from), weight, moments, n);
      else
        won = update_run(numbers, at<float>(t.grad, from), weight, moments, n);
      if (t.average) average_run(weight, t.average + from, t.average_weight, n);
    });
    return won != 0;
  }

  bool update_by(const float* first, const float* size) const {
    uint32_t won = 0;
    with_weight([&](const auto& weight) {
      won = update_weights(Numbers(job, t), weight, first, size, n);
      if (t.average) average_run(weight, t.average + from, t.average_weight, n);
    });
    return won != 0;
  }

  bool update_in_place() const {
    if (job.moments == Moments::F32)
      return update(FloatMoments{at<float>(t.exp_avg, from), at<float>(t.exp_avg_sq, from)});
    uint16_t* const m = at<uint16_t>(t.exp_avg, from);
    uint16_t* const v = at<uint16_t>(t.exp_avg_sq, from);
    return job.stochastic ? update(Bf16Moments<true>{m, v, random})
                          : update(Bf16Moments<false>{m, v, random});
  }
};

// Calls body(run, elements before it) for the runs of a chunk: one, or two where the chunk crosses
// a border of the blocks of random bits.
template <class Body>
static void for_each_run(const AdamWJob& job, const AdamWTensor& t, const RandomTable& table,
                         int64_t from, int n, const Body& body) {
  for (int before = 0; before < n;) {
    const uint64_t index = uint64_t(t.first + from + before);
    const int rest = kRandomBlock - int(index % kRandomBlock);
    const int size = n - before < rest ? n - before : rest;
    body(Run{job, t, from + before, size, RandomRun(table, index)}, before);
    before += size;
  }
}

// A block of 8-bit moments: their new values, the weights, and the values' codes.
struct CodedBlock {
  const AdamWJob& job;
  const AdamWTensor& t;
  const int64_t from;
  const int n;
  alignas(64) float m[kMomentBlock], v[kMomentBlock], roots[kMomentBlock];
  alignas(64) uint32_t draws[kMomentBlock];
  float m_top, v_top;

  CodedBlock(const AdamWJob& of, const AdamWTensor& tensor, int64_t first, int size)
      : job(of), t(tensor), from(first), n(size) {}

  CodedMoments codes() const {
    const int64_t block = from / kMomentBlock;
    return {at<int8_t>(t.exp_avg, from), at<uint8_t>(t.exp_avg_sq, from), t.exp_avg_scale + block,
            t.exp_avg_sq_scale + block};
  }

  void update_moments() {
    const Numbers numbers(job, t);
    const DecodedMoments decoded{m, v, roots};
    if (job.grad_bf16)
      update_coded(numbers, at<uint16_t>(t.grad, from), codes(), decoded, n, m_top, v_top);
    else
      update_coded(numbers, at<float>(t.grad, from), codes(), decoded, n, m_top, v_top);
  }

  bool update_weights(const Run& run, int before) {
    if (job.stochastic)
      for (int i = 0; i < run.n; i++) draws[before + i] = run.random.of_moments(i);
    return run.update_by(m + before, roots + before);
  }

  template <bool Stochastic>
  void encode_all() const {
    const CodedMoments to = codes();
    encode<false, Stochastic>(m, roots, m_top, to.m, to.m_scale, n, draws);
    encode<true, Stochastic>(v, roots, v_top, to.v, to.v_scale, n, draws);
  }
};

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

// Returns whether a weight won over its master.
static bool update_coded_block(const AdamWJob& job, const AdamWTensor& t, const RandomTable& table,
                               int64_t from, int n) {
  prefetch_block(job, t, from + 2 * kMomentBlock);
  CodedBlock block(job, t, from, n);
  bool won = false;
  block.update_moments();
  for_each_run(job, t, table, from, n,
               [&](const Run& run, int before) { won |= block.update_weights(run, before); });
  if (job.stochastic)
    block.encode_all<true>();
  else
    block.encode_all<false>();
  return won;
}
