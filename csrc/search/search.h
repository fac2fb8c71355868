// Inner products of stored rows with a few vectors.
#pragma once
#include <cstdint>

#include "common/dtypes.h"

// out[r, v] = the sum over c of rows[r, c] * vectors[v, c].
struct RowProducts {
  const void* rows;  // [count, width] of `type`: BF16, F16 or F32
  DType type;
  int64_t count, width, stride;  // stride: elements from one row to the next
  const float* vectors;          // [num_vectors, width]
  int64_t num_vectors;
  float* out;  // [count, num_vectors]
  int threads;
};

struct SearchKernels {
  void (*row_products)(const RowProducts& job);
};
