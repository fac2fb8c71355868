// CountSketch, hash version 3, which kernels/sketch/__init__.py defines.
#pragma once
#include <cstdint>

// Rows of examples laid end to end: example b has the rows offsets[b] .. offsets[b + 1] - 1.
struct SketchMatrix {
  const void* data;  // [rows, cols], float or bf16 bits
  bool bf16;
  int64_t cols, row_stride;  // elements
};

// Where a sketch goes: a shard of a parameter, which starts at (first_row, first_col) of all_cols
// columns.
struct SketchTarget {
  const int64_t* offsets;  // [examples + 1]
  int64_t examples;
  int64_t first_row, first_col, all_cols;
  uint64_t key;                    // of (hash version, seed, parameter name)
  int64_t proj_dim;                // multiple of 64 * 64
  int64_t group_rows, group_cols;  // tiles of a group, which has one for each bucket
  int64_t groups;                  // across the parameter
  const float*
      scale;  // [rows, cols] of the shard, multiplies the gradient before it is hashed; or null
  int64_t scale_stride;  // elements
  float* out;            // [examples, proj_dim], added to
  int parts, threads;    // parts <= proj_dim / (64 * 64); they own disjoint buckets
};

// Gradients that exist: row n is row row_ids[n] of the parameter, or without ids first_row + its
// place in the example.
struct SketchRows : SketchTarget {
  SketchMatrix x;
  const int64_t* row_ids;  // or null
};

// Words (32 bits) of a reduction at a time: two planes of X fill half of L1.
const int64_t kDepth = 128;
// Of operands of X; next to a sketch of 65536 floats they take half of L2.
const int64_t kPanelWords = 9 * 64 * kDepth;

// Returns this thread's memory for the operands of a strip of dY and a panel of X, aligned to 64
// bytes. It is kept: pages that are new in every call cost 5 % of a product.
uint32_t* linear_scratch();

// dY^T X of each example; rows of the matrices are tokens.
struct LinearSketch : SketchTarget {
  SketchMatrix dy, x;
};

// out[b, c] += the sum over the tokens of example b of dy[., c] * x[., c]. With `normalize` each
// row of x is first divided by its root mean square.
struct TokenSums {
  SketchMatrix dy, x;      // x without data: sums dy only
  const int64_t* offsets;  // [examples + 1]
  int64_t examples;
  bool normalize;
  float epsilon;  // added to the mean square
  float* out;     // [examples, dy.cols]
  int threads;
};

struct SketchKernels {
  void (*rows)(const SketchRows& job);
  void (*linear)(const LinearSketch& job);
  void (*token_sums)(const TokenSums& job);
};
