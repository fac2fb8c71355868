// Changes of an adapter that are no low-rank products: lengths of vectors (DoRA), new rows.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/read/changes.h"

// Multiplies row i of a matrix by factors[i], or column i.
class ScaledVectors : public Change {
 public:
  ScaledVectors(const double* factors, int64_t cols, bool by_column)
      : factors_(factors), cols_(cols), by_column_(by_column) {}

  int apply(const Reading& reading, int64_t first, int64_t n, double* values,
            char* scratch) const override;

 private:
  const double* factors_;
  int64_t cols_;
  bool by_column_;
};

// Replaces rows of a matrix by rows of another.
class ReplacedRows : public Change {
 public:
  struct Pair {
    int64_t row, source_row;
  };

  // pairs: by rising row.
  ReplacedRows(SourcePtr source, std::vector<Pair> pairs, int64_t cols)
      : source_(std::move(source)), pairs_(std::move(pairs)), cols_(cols) {}

  size_t scratch_bytes(int64_t n) const override { return double_scratch(*source_, n); }
  int apply(const Reading& reading, int64_t first, int64_t n, double* values,
            char* scratch) const override;

 private:
  SourcePtr source_;
  std::vector<Pair> pairs_;
  int64_t cols_;
};
