#include "engine/write/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>
#include <tuple>

#include "engine/write/encode.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Values = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Sizes = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

BlockRows block_rows_of(const Values& values, int64_t first_row, int64_t block_rows,
                        int64_t block_cols) {
  if (first_row < 0 || block_rows < 1 || block_cols < 1)
    throw std::invalid_argument("encode: blocks must have rows and columns");
  return {.values = values.data(),
          .rows = int64_t(values.shape(0)),
          .cols = int64_t(values.shape(1)),
          .first_row = first_row,
          .block_rows = block_rows,
          .block_cols = block_cols};
}

// Grid rows from the block of row `first` to that of the last row.
void check_grid(const BlockRows& rows, int64_t first, size_t grid_rows, size_t grid_cols) {
  const int64_t last = (rows.first_row + rows.rows - 1) / rows.block_rows;
  const bool has_rows = rows.rows < 1 || last - first / rows.block_rows < int64_t(grid_rows);
  if (!has_rows || int64_t(grid_cols) * rows.block_cols < rows.cols)
    throw std::invalid_argument("encode: the grid must have a number for each block");
}

}  // namespace

void define_encoding(nb::module_& m) {
  m.def(
      "block_sizes",
      [](const Values& values, int64_t first_row, int64_t block_rows, int64_t block_cols,
         Sizes sizes) {
        const BlockRows rows = block_rows_of(values, first_row, block_rows, block_cols);
        check_grid(rows, first_row, sizes.shape(0), sizes.shape(1));
        const nb::gil_scoped_release release;
        block_sizes(rows, sizes.data());
      },
      nb::kw_only(), "values"_a.noconvert(), "first_row"_a, "block_rows"_a, "block_cols"_a,
      "sizes"_a.noconvert());
  m.def(
      "encode_rows",
      [](const Values& values, int64_t first_row, int64_t block_rows, int64_t block_cols,
         int mantissa_bits, int bias, int largest, int infinity, const Values& scales,
         Codes codes) {
        const BlockRows rows = block_rows_of(values, first_row, block_rows, block_cols);
        check_grid(rows, 0, scales.shape(0), scales.shape(1));
        if (codes.shape(0) != values.shape(0) || codes.shape(1) != values.shape(1))
          throw std::invalid_argument("encode_rows: codes must have the shape of the values");
        const CodeKind kind{
            .mantissa_bits = mantissa_bits, .bias = bias, .largest = largest, .infinity = infinity};
        RoundingErrors errors;
        {
          const nb::gil_scoped_release release;
          errors = encode_rows(rows, kind, scales.data(), codes.data());
        }
        return std::make_tuple(errors.largest, errors.squares, errors.value_squares);
      },
      nb::kw_only(), "values"_a.noconvert(), "first_row"_a, "block_rows"_a, "block_cols"_a,
      "mantissa_bits"_a, "bias"_a, "largest"_a, "infinity"_a, "scales"_a.noconvert(),
      "codes"_a.noconvert());
}
