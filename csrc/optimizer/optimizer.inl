// AdamW in one pass over each parameter, sums of squares, and the table of both at one level.
#include "optimizer/rounding.inl"
#include "optimizer/codes.inl"
#include "optimizer/moments.inl"
#if MERIT_AVX512
#include "optimizer/lanes.inl"
#endif
#include "optimizer/elements.inl"
#include "optimizer/update.inl"
#include "optimizer/coded.inl"

// Returns whether a weight won over its master.
static bool update_chunk(const AdamWJob& job, const AdamWTensor& t, const RandomTable& table,
                         int64_t from, int n) {
  bool won = false;
  if (job.moments == Moments::INT8) {
    for (int i = 0; i < n; i += kCodedChunk)
      won |= update_coded_chunk(job, t, table, from + i, n - i < kCodedChunk ? n - i : kCodedChunk);
  } else {
    for_each_run(job, t, table, from, n,
                 [&](const Run& run, int) { won |= run.update_in_place(); });
  }
  if (job.zero_grad) {
    const size_t size = job.grad_bf16 ? 2 : 4;
    std::memset(static_cast<char*>(t.grad) + size_t(from) * size, 0, size_t(n) * size);
  }
  return won;
}

static void update_item(const AdamWJob& job, const AdamWTensor& t, int64_t first, int64_t stop) {
  RandomTable table;
  if (job.stochastic) table.fill(t.key);
  bool won = false;
  for (int64_t from = first; from < stop; from += kUpdateChunk) {
    const int n = stop - from < kUpdateChunk ? int(stop - from) : kUpdateChunk;
    won |= update_chunk(job, t, table, from, n);
  }
  if (won) {
#pragma omp atomic write
    *t.won = 1;
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
