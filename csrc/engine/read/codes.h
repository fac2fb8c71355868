// Sources whose stored codes are decoded to float64 while they are read: one class for all formats,
// made by merge/engine/compiled/sources.py from a DecodedEntry, whose formula it follows.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/read/source.h"

// A number of a matrix's blocks: scales or zero points. Every matrix of a stack has a grid of its
// own; the grids follow each other in `numbers`.
struct Grid {
  SourcePtr numbers;  // [matrices * grid_rows, grid_cols]
  int64_t rows;       // of one matrix
  int64_t grid_rows, grid_cols, block_rows, block_cols;
  bool divides;            // values are divided by the number
  const int32_t* columns;  // [cols] grid column of each column; null: column / block_cols
};

// Codes of at most 8 bits, lowest bits first: (table[code] - zero) * scale * ...
class CodesSource : public Source {
 public:
  struct Layout {
    int64_t file, offset;     // bytes
    int64_t cols, row_bytes;  // of a row of codes
    int64_t bits;
    const double* table;  // [2^bits]
  };

  CodesSource(const Layout& layout, std::vector<Grid> zeros, std::vector<Grid> scales)
      : layout_(layout), zeros_(std::move(zeros)), scales_(std::move(scales)) {}

  DType type() const override { return DType::F64; }
  int64_t worthwhile_gap() const override { return 256; }
  size_t scratch_bytes(int64_t n) const override;
  int read(const Reading& reading, int64_t first, int64_t n, char* out,
           char* scratch) const override;

 private:
  bool is_dense() const { return layout_.row_bytes * 8 == layout_.cols * layout_.bits; }
  int64_t rows_in(int64_t n) const { return n / layout_.cols + 2; }
  int64_t code_bytes(int64_t n) const;
  int read_codes(const Reading& reading, int64_t first, int64_t n, double* out,
                 char* scratch) const;
  static size_t row_scratch(const Grid& grid);
  template <class Combine>
  int apply_rows(const Reading& reading, const Grid& grid, int64_t first, int64_t n, double* out,
                 char* scratch, const Combine& combine) const;
  template <class Combine>
  int apply(const Reading& reading, const Grid& grid, int64_t first, int64_t n, double* out,
            char* scratch, const Combine& combine) const;

  Layout layout_;
  std::vector<Grid> zeros_;  // none or one
  std::vector<Grid> scales_;
};

// A grid whose numbers of one column lie next to each other in 32-bit words. Number i of a column
// starts at bit i * bits.
class PackedRowsSource : public Source {
 public:
  PackedRowsSource(int64_t file, int64_t offset, int64_t cols, int64_t bits, const double* table)
      : file_(file), offset_(offset), cols_(cols), bits_(bits), table_(table) {}

  DType type() const override { return DType::F64; }
  int64_t worthwhile_gap() const override { return 256; }
  size_t scratch_bytes(int64_t) const override { return round_up(size_t(cols_) * 8); }
  int read(const Reading& reading, int64_t first, int64_t n, char* out,
           char* scratch) const override;

 private:
  int64_t file_, offset_, cols_, bits_;
  const double* table_;
};
