#include "engine/read/adapters.h"

#include <algorithm>

int ScaledVectors::apply(const Reading&, int64_t first, int64_t n, double* values, char*) const {
  for (int64_t done = 0, m = 0; done < n; done += m) {
    const int64_t row = (first + done) / cols_;
    const int64_t col = (first + done) % cols_;
    m = std::min(cols_ - col, n - done);
    double* run = values + done;
    if (by_column_) {
      for (int64_t i = 0; i < m; i++) run[i] *= factors_[col + i];
    } else {
      const double factor = factors_[row];
      for (int64_t i = 0; i < m; i++) run[i] *= factor;
    }
  }
  return 0;
}

int ReplacedRows::apply(const Reading& reading, int64_t first, int64_t n, double* values,
                        char* scratch) const {
  const auto before = [](const Pair& pair, int64_t row) { return pair.row < row; };
  const auto begin = std::lower_bound(pairs_.begin(), pairs_.end(), first / cols_, before);
  for (auto pair = begin; pair != pairs_.end() && pair->row * cols_ < first + n; ++pair) {
    const int64_t low = std::max(pair->row * cols_, first);
    const int64_t high = std::min((pair->row + 1) * cols_, first + n);
    const int64_t from = pair->source_row * cols_ + low - pair->row * cols_;
    const int error =
        read_doubles(reading, *source_, from, high - low, values + (low - first), scratch);
    if (error) return error;
  }
  return 0;
}
