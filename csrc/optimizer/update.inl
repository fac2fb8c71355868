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
