#include "engine/read/changes.h"

#include <algorithm>

int LowRank::apply(const Reading& reading, int64_t first, int64_t n, double* values, char*) const {
  const int64_t block = block_rows_ * cols_;
  for (int64_t done = 0, m = 0; done < n; done += m) {
    const int64_t number = (first + done) / block;
    const int64_t inside = (first + done) % block;
    m = std::min(block - inside, n - done);
    const float* left = left_ + number * block_rows_ * rank_;
    const float* right = right_ + number * rank_ * cols_;
    double* run = values + done;
    reading.kernels.low_rank_rows(run, left, right, rank_, cols_, factor_, inside, m, run);
  }
  return 0;
}

size_t ChangedSource::scratch_bytes(int64_t n) const {
  size_t most = double_scratch(*source_, n);
  for (const ChangePtr& change : changes_) most = std::max(most, change->scratch_bytes(n));
  return most;
}

int ChangedSource::read(const Reading& reading, int64_t first, int64_t n, char* out,
                        char* scratch) const {
  double* values = reinterpret_cast<double*>(out);
  int error = read_doubles(reading, *source_, first, n, values, scratch);
  for (const ChangePtr& change : changes_) {
    if (error) return error;
    error = change->apply(reading, first, n, values, scratch);
  }
  return error;
}
