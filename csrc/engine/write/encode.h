// Values as 8-bit floats with a scale per block. merge/engine/quantise/encode.py is the reference:
// the same codes, and sums of errors in another order.
#pragma once
#include <cstdint>

// Rows of one matrix, from row `first_row` on, and the blocks of the matrix.
struct BlockRows {
  const double* values;  // [rows, cols]
  int64_t rows, cols, first_row, block_rows, block_cols;
};

// An 8-bit float: a sign, an exponent and a mantissa.
struct CodeKind {
  int mantissa_bits, bias;
  int largest;   // code of the largest finite value
  int infinity;  // code of infinity, or of NaN where there is none
};

struct RoundingErrors {
  double largest = 0.0;
  double squares = 0.0;
  double value_squares = 0.0;
};

// Raises sizes [row blocks, column blocks] to the largest finite absolute value of each block. The
// first row of sizes is that of the block of the first row.
void block_sizes(const BlockRows& rows, double* sizes);

// Writes codes [rows, cols]: value / scale to the nearest code, ties to the even one. scales:
// [row blocks, column blocks] of the whole matrix.
RoundingErrors encode_rows(const BlockRows& rows, const CodeKind& kind, const double* scales,
                           uint8_t* codes);
