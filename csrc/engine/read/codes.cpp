#include "engine/read/codes.h"

#include <algorithm>
#include <cmath>

namespace {

struct Float8Table {
  double values[256];
  Float8Table(int mantissa, int bias, bool infinities) {
    const int exponents = 1 << (7 - mantissa), steps = 1 << mantissa;
    for (int code = 0; code < 256; code++) {
      const int exponent = (code & 127) >> mantissa, fraction = code & (steps - 1);
      double value = exponent ? std::ldexp(1.0 + double(fraction) / steps, exponent - bias)
                              : std::ldexp(double(fraction) / steps, 1 - bias);
      if (infinities && exponent == exponents - 1) value = fraction ? NAN : INFINITY;
      if (!infinities && (code & 127) == 127) value = NAN;
      values[code] = code & 128 ? -value : value;
    }
  }
};

}  // namespace

int Float8Source::read(const Reading& reading, int64_t first, int64_t n, char* out,
                       char* scratch) const {
  const int error = read_bytes(reading.remote, file_, offset_ + first, n, scratch);
  if (error) return error;
  static const Float8Table e4m3(3, 7, false), e5m2(2, 15, true);
  const double* table = e5m2_ ? e5m2.values : e4m3.values;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(scratch);
  double* values = reinterpret_cast<double*>(out);
  for (int64_t i = 0; i < n;) {
    const int64_t row = (first + i) / scales_.cols, col = (first + i) % scales_.cols;
    const int64_t block = col / scales_.block_cols;
    const int64_t end = std::min((block + 1) * scales_.block_cols, scales_.cols);
    const int64_t stop = std::min(i + end - col, n);
    const double scale = scales_.values[row / scales_.block_rows * scales_.scale_cols + block];
    for (; i < stop; i++) values[i] = table[codes[i]] * scale;
  }
  return 0;
}
