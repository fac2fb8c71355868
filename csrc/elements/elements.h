// Merges of one tensor that decide by element, row or column.
#pragma once
#include <cstdint>
#include <functional>

#include "engine/streaming.h"

// How a tensor is merged element by element: the fields of ElementRule in
// kernels/average/elements.py.
enum class ElementKind { near, active, important };
struct ElementRule {
  ElementKind kind;
  double t;                  // near
  double epsilon, r, alpha;  // active
  int64_t row;               // important
};
MergeResult merge_elements(const Engine& engine, const Segment& tensor, const ElementRule& rule);

// Weights for vectors of a tensor from their Gram matrices. gram is [vectors, branches, branches],
// weights [vectors, inputs]; returns false after an error.
typedef std::function<bool(const double* gram, int64_t vectors, double* weights)> VectorWeights;

// A tensor cut into vectors that are summed with weights of their own: rows of `length` elements,
// or with `period` the columns of a [elements / period, period] matrix.
struct VectorJob {
  int64_t length, period;
  int branches;
  bool from_base;
  VectorWeights weights;
};
MergeResult merge_vectors(const Engine& engine, const Segment& tensor, const VectorJob& job);
