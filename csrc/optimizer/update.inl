// The update of a run of elements in one loop, and the choice of the loop for each kind of tensor.

// The numbers of one step of one tensor.
struct Numbers {
  uint32_t near;  // all bits: m starts from its old value, else from g: exact at both ends
  float step, clip, beta2, rest2, decay, root, epsilon, rate;

  Numbers(const AdamWJob& job, const AdamWTensor& t)
      : near(job.rest1 < 0.5f ? ~0u : 0u),
        step(near ? job.rest1 : -job.beta1),
        clip(job.clip),
        beta2(job.beta2),
        rest2(job.rest2),
        decay(job.decay),
        root(t.root),
        epsilon(job.epsilon),
        rate(t.rate) {}
};

// Returns bits other than 0 if a weight won over its master. No two arrays overlap, which the
// compiler is told. Square roots vectorize because of -fno-math-errno.
template <class Grad, class Weight, class Moments>
static uint32_t update_run(const Numbers& x, const Grad* grad, const Weight weight,
                           const Moments moments, int n) {
  const uint32_t near = x.near;
  const float step = x.step, clip = x.clip, beta2 = x.beta2, rest2 = x.rest2, decay = x.decay;
  const float root = x.root, epsilon = x.epsilon, rate = x.rate;
  uint32_t won = 0;
#pragma GCC ivdep
  for (int i = 0; i < n; i++) {
    const float g = value_of(grad[i]) * clip;
    const float m = moments.first(i);
    const float from = as_float((as_bits(m) & near) | (as_bits(g) & ~near));
    const float first = from + step * (g - m);
    const float second = moments.second(i) * beta2 + rest2 * g * g;
    const float size = std::sqrt(second);
    const float w = weight.load(i, won);
    moments.store(i, first, second, size);
    weight.store(i, w * decay - rate * (first / (size * root + epsilon)));
  }
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

// A chunk of 8-bit moments: decodes, updates and encodes whole blocks.
struct CodedChunk {
  const AdamWTensor& t;
  const int64_t from;
  const int n;
  alignas(64) float m[kUpdateChunk], v[kUpdateChunk], roots[kUpdateChunk];
  alignas(64) uint32_t draws[kUpdateChunk];

  CodedChunk(const AdamWTensor& tensor, int64_t first, int size)
      : t(tensor), from(first), n(size) {}

  template <class Body>
  void for_each_block(const Body& body) {
    for (int i = 0; i < n; i += kMomentBlock)
      body(i, (from + i) / kMomentBlock, n - i < kMomentBlock ? n - i : kMomentBlock);
  }

  void decode_all() {
    for_each_block([&](int i, int64_t block, int size) {
      decode<false>(at<int8_t>(t.exp_avg, from + i), t.exp_avg_scale[block], m + i, size);
      decode<true>(at<uint8_t>(t.exp_avg_sq, from + i), t.exp_avg_sq_scale[block], v + i, size);
    });
  }

  bool update(const Run& run, int before) {
    if (run.job.stochastic)
      for (int i = 0; i < run.n; i++) draws[before + i] = run.random.of_moments(i);
    return run.update(DecodedMoments{m + before, v + before, roots + before});
  }

  template <bool Stochastic>
  void encode_all() {
    for_each_block([&](int i, int64_t block, int size) {
      encode<false, Stochastic>(m + i, roots + i, at<int8_t>(t.exp_avg, from + i),
                                t.exp_avg_scale + block, size, draws + i);
      encode<true, Stochastic>(v + i, roots + i, at<uint8_t>(t.exp_avg_sq, from + i),
                               t.exp_avg_sq_scale + block, size, draws + i);
    });
  }
};
