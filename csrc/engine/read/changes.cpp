#include "engine/read/changes.h"

#include <algorithm>

int LowRank::apply(const Reading& reading, int64_t first, int64_t n, double* values, char*) const {
  reading.kernels.low_rank_rows(values, left_, right_, rank_, cols_, factor_, first, n, values);
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
