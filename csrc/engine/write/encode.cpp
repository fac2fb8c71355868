#include "engine/write/encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

const int kDoubleMantissa = 52;
const int kDoubleBias = 1023;
const int kNan = 127;
const int kSign = 128;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// The code of a finite value >= 0.
inline int round_to_code(const CodeKind& kind, double size) {
  uint64_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  const int exponent = int(bits >> kDoubleMantissa) - kDoubleBias;
  int64_t code;
  if (exponent >= 1 - kind.bias) {
    const int dropped = kDoubleMantissa - kind.mantissa_bits;
    const uint64_t odd = bits >> dropped & 1;
    const uint64_t rounded = (bits + (uint64_t(1) << (dropped - 1)) - 1 + odd) >> dropped;
    code = int64_t(rounded) - (int64_t(kDoubleBias - kind.bias) << kind.mantissa_bits);
  } else {  // a multiple of the smallest value
    code = int64_t(std::nearbyint(std::ldexp(size, kind.mantissa_bits + kind.bias - 1)));
  }
  return int(std::min<int64_t>(code, kind.largest));
}

struct CodeValues {
  double values[kSign];
  explicit CodeValues(const CodeKind& kind) {
    const int steps = 1 << kind.mantissa_bits;
    for (int code = 0; code <= kind.largest; code++) {
      const int exponent = code >> kind.mantissa_bits;
      const int fraction = code & (steps - 1);
      values[code] =
          exponent ? std::ldexp(double(steps + fraction), exponent - kind.bias - kind.mantissa_bits)
                   : std::ldexp(double(fraction), 1 - kind.bias - kind.mantissa_bits);
    }
  }
};

}  // namespace

void block_sizes(const BlockRows& rows, double* sizes) {
  const int64_t grid_cols = blocks(rows.cols, rows.block_cols);
  const int64_t first_block = rows.first_row / rows.block_rows;
  for (int64_t r = 0; r < rows.rows; r++) {
    const double* line = rows.values + r * rows.cols;
    double* grid = sizes + ((rows.first_row + r) / rows.block_rows - first_block) * grid_cols;
    for (int64_t block = 0; block < grid_cols; block++) {
      const int64_t begin = block * rows.block_cols;
      const int64_t end = std::min(begin + rows.block_cols, rows.cols);
      double largest = grid[block];
      for (int64_t c = begin; c < end; c++) {
        const double size = std::fabs(line[c]);
        if (std::isfinite(size)) largest = std::max(largest, size);
      }
      grid[block] = largest;
    }
  }
}

RoundingErrors encode_rows(const BlockRows& rows, const CodeKind& kind, const double* scales,
                           uint8_t* codes) {
  const CodeValues table(kind);
  const int64_t grid_cols = blocks(rows.cols, rows.block_cols);
  RoundingErrors errors;
  for (int64_t r = 0; r < rows.rows; r++) {
    const double* line = rows.values + r * rows.cols;
    const double* grid = scales + (rows.first_row + r) / rows.block_rows * grid_cols;
    uint8_t* out = codes + r * rows.cols;
    for (int64_t c = 0; c < rows.cols; c++) {
      const double scale = grid[c / rows.block_cols];
      const double value = line[c];
      const int sign = std::signbit(value) ? kSign : 0;
      if (!std::isfinite(value)) {
        out[c] = uint8_t((std::isnan(value) ? kNan : kind.infinity) | sign);
        continue;
      }
      const double size = std::fabs(value);
      const int code = round_to_code(kind, size / scale);
      const double error = size - table.values[code] * scale;
      out[c] = uint8_t(code | sign);
      errors.largest = std::max(errors.largest, std::fabs(error));
      errors.squares += error * error;
      errors.value_squares += value * value;
    }
  }
  return errors;
}
