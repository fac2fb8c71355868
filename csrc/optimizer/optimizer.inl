// AdamW in one pass over each parameter, sums of squares, and the table of both at one level.
#include "optimizer/rounding.inl"
#include "optimizer/codes.inl"
#include "optimizer/chunks.inl"

// Updates n elements in float. Square roots vectorize because of -fno-math-errno.
static void update_chunk(const AdamWJob& job, const AdamWTensor& t, int n, float* __restrict w,
                         const float* __restrict g, float* __restrict m, float* __restrict v) {
  const bool near = job.rest1 < 0.5f;  // starts from the nearer end, as torch does: exact at both
  const float step = near ? job.rest1 : -job.beta1;
  const float clip = job.clip, beta2 = job.beta2, rest2 = job.rest2, decay = job.decay;
  const float root = t.root, epsilon = job.epsilon, rate = t.rate;
  for (int i = 0; i < n; i++) {
    const float gradient = g[i] * clip;
    const float from = near ? m[i] : gradient;
    const float first = from + step * (gradient - m[i]);
    const float second = v[i] * beta2 + rest2 * gradient * gradient;
    const float denominator = std::sqrt(second) * root + epsilon;
    m[i] = first;
    v[i] = second;
    w[i] = w[i] * decay - rate * (first / denominator);
  }
}

static void average_chunk(float* __restrict average, const float* __restrict w, float share,
                          int n) {
  for (int i = 0; i < n; i++) average[i] += (w[i] - average[i]) * share;
}

static void update_item(const AdamWJob& job, const AdamWTensor& t, int64_t first, int64_t stop) {
  const uint32_t low = uint32_t(t.key), high = uint32_t(t.key >> 32);
  WeightChunk weights;
  MomentChunk moments;
  alignas(64) float widened[kUpdateChunk];
  for (int64_t from = first; from < stop; from += kUpdateChunk) {
    const int n = stop - from < kUpdateChunk ? int(stop - from) : kUpdateChunk;
    const float* g = widened;
    if (job.grad_bf16)
      widen_all(at<uint16_t>(t.grad, from), widened, n);
    else
      g = at<float>(t.grad, from);
    weights.load(job, t, from, n);
    moments.load(job, t, from, n);
    update_chunk(job, t, n, weights.w, g, moments.m, moments.v);
    weights.store(job, t, from, n, {low, high});
    moments.store(job, t, from, n, {high, low});
    if (t.average) average_chunk(t.average + from, weights.w, t.average_weight, n);
    if (job.zero_grad) {
      const size_t item = job.grad_bf16 ? 2 : 4;
      std::memset(static_cast<char*>(t.grad) + size_t(from) * item, 0, size_t(n) * item);
    }
  }
}

// Calls body(tensor, first, stop, item) for every kUpdateItem elements of every tensor, in one
// parallel region.
template <class Size, class Body>
static void for_each_update_item(int64_t count, int threads, const Size& size, const Body& body) {
  int64_t items = 0;
  for (int64_t k = 0; k < count; k++) items += update_items(size(k));
#pragma omp parallel num_threads(threads)
  {
    // The items of a thread ascend, so its search continues from the last one.
    int64_t tensor = 0;
    int64_t before = 0;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < items; item++) {
      while (item >= before + update_items(size(tensor))) before += update_items(size(tensor++));
      const int64_t first = (item - before) * kUpdateItem, n = size(tensor);
      body(tensor, first, first + kUpdateItem < n ? first + kUpdateItem : n, item);
    }
  }
}

static void adamw(const AdamWJob& job) {
  for_each_update_item(
      job.count, job.threads, [&](int64_t k) { return job.tensors[k].n; },
      [&](int64_t k, int64_t first, int64_t stop, int64_t) {
        update_item(job, job.tensors[k], first, stop);
      });
}

template <class T>
static double square_sum(const T* x, int64_t n) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) {
      const double value = double(value_of(x[i + j]));
      lanes[j] += value * value;
    }
  for (; i < n; i++) lanes[0] += double(value_of(x[i])) * double(value_of(x[i]));
  for (int width = 8; width; width /= 2)
    for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
  return lanes[0];
}

static void square_sums(const SquareSums& job) {
  for_each_update_item(
      job.count, job.threads, [&](int64_t k) { return job.sizes[k]; },
      [&](int64_t k, int64_t first, int64_t stop, int64_t item) {
        job.sums[item] =
            job.bf16 ? square_sum(static_cast<const uint16_t*>(job.data[k]) + first, stop - first)
                     : square_sum(static_cast<const float*>(job.data[k]) + first, stop - first);
      });
}

extern const OptimizerKernels optimizer_kernels = {
    .adamw = adamw,
    .square_sums = square_sums,
};
