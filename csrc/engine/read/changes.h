// A source with an adapter's changes, in float64. Every kind of change is a subclass of Change,
// bound in bindings.cpp and made by merge/engine/sources.py.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/read/source.h"

class Change {
 public:
  virtual ~Change() = default;

  // Bytes that `apply` works in for at most n elements.
  virtual size_t scratch_bytes(int64_t) const { return 0; }

  // Changes elements first .. first + n of a tensor in place. Returns 0 or an errno.
  virtual int apply(const Reading& reading, int64_t first, int64_t n, double* values,
                    char* scratch) const = 0;
};

typedef std::shared_ptr<const Change> ChangePtr;

// Adds factor * left [rows, rank] @ right [rank, cols]. Every block_rows rows have a right of their
// own, one after the other: the experts of a stack.
class LowRank : public Change {
 public:
  LowRank(const float* left, const float* right, int64_t rank, int64_t cols, int64_t block_rows,
          double factor)
      : left_(left),
        right_(right),
        rank_(rank),
        cols_(cols),
        block_rows_(block_rows),
        factor_(factor) {}

  int apply(const Reading& reading, int64_t first, int64_t n, double* values,
            char* scratch) const override;

 private:
  const float *left_, *right_;
  int64_t rank_, cols_, block_rows_;
  double factor_;
};

class ChangedSource : public Source {
 public:
  ChangedSource(SourcePtr source, std::vector<ChangePtr> changes)
      : source_(std::move(source)), changes_(std::move(changes)) {}

  DType type() const override { return DType::F64; }
  size_t scratch_bytes(int64_t n) const override;
  int64_t worthwhile_gap() const override { return 64; }
  int read(const Reading& reading, int64_t first, int64_t n, char* out,
           char* scratch) const override;

 private:
  SourcePtr source_;
  std::vector<ChangePtr> changes_;  // in the order in which they are applied
};
