#include "engine/read/codes.h"

#include <algorithm>
#include <cstring>

namespace {

const int64_t kWordBits = 32;

// Returns the code of `bits` bits that starts at a bit of the bytes. The second byte is read only
// where the code reaches into it.
inline uint32_t code_at(const uint8_t* bytes, int64_t bit, int64_t bits) {
  const int64_t byte = bit / 8;
  const int64_t shift = bit % 8;
  uint32_t pair = bytes[byte];
  if (shift + bits > 8) pair |= uint32_t(bytes[byte + 1]) << 8;
  return (pair >> shift) & ((1u << bits) - 1);
}

}  // namespace

int64_t CodesSource::code_bytes(int64_t n) const {
  return is_dense() ? n * layout_.bits / 8 + 2 : rows_in(n) * layout_.row_bytes;
}

size_t CodesSource::scratch_bytes(int64_t n) const {
  size_t largest = round_up(size_t(code_bytes(n)));
  for (const std::vector<Grid>* grids : {&zeros_, &scales_})
    for (const Grid& grid : *grids) largest = std::max(largest, row_scratch(grid));
  return largest;
}

// Scratch for one row of a grid; several rows take at most as much for each.
size_t CodesSource::row_scratch(const Grid& grid) {
  return round_up(size_t(grid.grid_cols) * 8) + double_scratch(*grid.numbers, grid.grid_cols);
}

int CodesSource::read_codes(const Reading& reading, int64_t first, int64_t n, double* out,
                            char* scratch) const {
  const Layout& l = layout_;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(scratch);
  if (is_dense()) {
    const int64_t start = first * l.bits / 8;
    const int64_t stop = ((first + n) * l.bits + 7) / 8;
    const int error = read_bytes(reading.remote, l.file, l.offset + start, stop - start, scratch);
    if (error) return error;
    if (l.bits == 8) {
      for (int64_t i = 0; i < n; i++) out[i] = l.table[bytes[i]];
      return 0;
    }
    int64_t bit = first * l.bits - start * 8;
    for (int64_t i = 0; i < n; i++, bit += l.bits) out[i] = l.table[code_at(bytes, bit, l.bits)];
    return 0;
  }
  const int64_t row = first / l.cols;
  const int64_t rows = (first + n - 1) / l.cols + 1 - row;
  const int error =
      read_bytes(reading.remote, l.file, l.offset + row * l.row_bytes, rows * l.row_bytes, scratch);
  if (error) return error;
  for (int64_t i = 0; i < n;) {
    const int64_t col = (first + i) % l.cols;
    const int64_t count = std::min(l.cols - col, n - i);
    const uint8_t* codes = bytes + ((first + i) / l.cols - row) * l.row_bytes;
    for (int64_t j = 0; j < count; j++)
      out[i + j] = l.table[code_at(codes, (col + j) * l.bits, l.bits)];
    i += count;
  }
  return 0;
}

// Combines every element with the grid's number of its block, as many rows at a time as the scratch
// for n elements has room for.
template <class Combine>
int CodesSource::apply(const Reading& reading, const Grid& grid, int64_t first, int64_t n,
                       double* out, char* scratch, const Combine& combine) const {
  const int64_t cols = layout_.cols;
  const int64_t room = int64_t(round_up(size_t(code_bytes(n))) / row_scratch(grid));
  const int64_t rows = std::max<int64_t>(room, 1);
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(n, ((first + i) / cols + rows) * cols - first);
    const int error = apply_rows(reading, grid, first + i, end - i, out + i, scratch, combine);
    if (error) return error;
    i = end;
  }
  return 0;
}

template <class Combine>
int CodesSource::apply_rows(const Reading& reading, const Grid& grid, int64_t first, int64_t n,
                            double* out, char* scratch, const Combine& combine) const {
  const int64_t cols = layout_.cols;
  const auto grid_row = [&](int64_t row) {
    return row / grid.rows * grid.grid_rows + row % grid.rows / grid.block_rows;
  };
  const int64_t low = grid_row(first / cols);
  const int64_t high = grid_row((first + n - 1) / cols);
  const int64_t count = (high + 1 - low) * grid.grid_cols;
  double* numbers = reinterpret_cast<double*>(scratch);
  const int error = read_doubles(reading, *grid.numbers, low * grid.grid_cols, count, numbers,
                                 scratch + round_up(size_t(count) * 8));
  if (error) return error;
  for (int64_t i = 0; i < n;) {
    const int64_t row = (first + i) / cols;
    const int64_t col = (first + i) % cols;
    const int64_t stop = std::min(i + cols - col, n);
    const double* line = numbers + (grid_row(row) - low) * grid.grid_cols;
    if (grid.columns) {
      for (int64_t j = col; i < stop; i++, j++) out[i] = combine(out[i], line[grid.columns[j]]);
      continue;
    }
    for (int64_t block = col / grid.block_cols; i < stop; block++) {
      const int64_t end = std::min(i + (block + 1) * grid.block_cols - (first + i) % cols, stop);
      const double number = line[block];
      for (; i < end; i++) out[i] = combine(out[i], number);
    }
  }
  return 0;
}

int CodesSource::read(const Reading& reading, int64_t first, int64_t n, char* out,
                      char* scratch) const {
  double* values = reinterpret_cast<double*>(out);
  int error = read_codes(reading, first, n, values, scratch);
  for (const Grid& zero : zeros_) {
    if (error) return error;
    error = apply(reading, zero, first, n, values, scratch,
                  [](double value, double number) { return value - number; });
  }
  for (const Grid& scale : scales_) {
    if (error) return error;
    error = scale.divides ? apply(reading, scale, first, n, values, scratch,
                                  [](double value, double number) { return value / number; })
                          : apply(reading, scale, first, n, values, scratch,
                                  [](double value, double number) { return value * number; });
  }
  return error;
}

int PackedRowsSource::read(const Reading& reading, int64_t first, int64_t n, char* out,
                           char* scratch) const {
  double* values = reinterpret_cast<double*>(out);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(scratch);
  int64_t loaded = -1;  // the word row in scratch, with the next one
  for (int64_t i = 0; i < n;) {
    const int64_t row = (first + i) / cols_;
    const int64_t col = (first + i) % cols_;
    const int64_t count = std::min(cols_ - col, n - i);
    const int64_t word = row * bits_ / kWordBits;
    const int64_t shift = row * bits_ % kWordBits;
    const bool crosses = shift + bits_ > kWordBits;
    const int64_t num_words = crosses ? 2 : 1;
    if (loaded != word || crosses) {
      const int error = read_bytes(reading.remote, file_, offset_ + word * cols_ * 4,
                                   num_words * cols_ * 4, scratch);
      if (error) return error;
      loaded = word;
    }
    for (int64_t j = col; j < col + count; j++, i++) {
      uint64_t pair = words[j];
      if (crosses) pair |= uint64_t(words[cols_ + j]) << 32;
      values[i] = table_[(pair >> shift) & ((1u << bits_) - 1)];
    }
  }
  return 0;
}
