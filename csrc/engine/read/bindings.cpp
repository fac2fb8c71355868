// merit_fast._C: the forms of an input. Arrays of numbers come as addresses, which the caller keeps
// alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "common/bindings.h"
#include "engine/read/adapters.h"
#include "engine/boxes/boxes.h"
#include "engine/read/changes.h"
#include "engine/read/codes.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Table = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void define_codes(nb::module_& m) {
  nb::class_<Grid>(m, "Grid").def(
      "__init__",
      [](Grid* self, SourcePtr numbers, int64_t rows, std::pair<int64_t, int64_t> shape,
         std::pair<int64_t, int64_t> block, bool divides, uintptr_t columns) {
        new (self) Grid{.numbers = std::move(numbers),
                        .rows = rows,
                        .grid_rows = shape.first,
                        .grid_cols = shape.second,
                        .block_rows = block.first,
                        .block_cols = block.second,
                        .divides = divides,
                        .columns = pointer<const int32_t>(columns)};
      },
      nb::kw_only(), "numbers"_a, "rows"_a, "shape"_a, "block"_a, "divides"_a, "columns"_a);
  nb::class_<CodesSource, Source>(m, "CodesSource")
      .def(
          "__init__",
          [](CodesSource* self, int64_t file, int64_t offset, int64_t cols, int64_t row_bytes,
             int64_t bits, uintptr_t table, std::vector<Grid> zeros, std::vector<Grid> scales) {
            new (self) CodesSource({.file = file,
                                    .offset = offset,
                                    .cols = cols,
                                    .row_bytes = row_bytes,
                                    .bits = bits,
                                    .table = pointer<const double>(table)},
                                   std::move(zeros), std::move(scales));
          },
          nb::kw_only(), "file"_a, "offset"_a, "cols"_a, "row_bytes"_a, "bits"_a, "table"_a,
          "zeros"_a, "scales"_a);
  nb::class_<PackedRowsSource, Source>(m, "PackedRowsSource")
      .def(
          "__init__",
          [](PackedRowsSource* self, int64_t file, int64_t offset, int64_t cols, int64_t bits,
             uintptr_t table) {
            new (self) PackedRowsSource(file, offset, cols, bits, pointer<const double>(table));
          },
          nb::kw_only(), "file"_a, "offset"_a, "cols"_a, "bits"_a, "table"_a);
}

void define_changes(nb::module_& m) {
  nb::class_<Change>(m, "Change");
  nb::class_<LowRank, Change>(m, "LowRank")
      .def(
          "__init__",
          [](LowRank* self, uintptr_t left, uintptr_t right, int64_t rank, int64_t cols,
             int64_t block_rows, double factor) {
            new (self) LowRank(pointer<const float>(left), pointer<const float>(right), rank, cols,
                               block_rows, factor);
          },
          nb::kw_only(), "left"_a, "right"_a, "rank"_a, "cols"_a, "block_rows"_a, "factor"_a);
  nb::class_<ScaledVectors, Change>(m, "ScaledVectors")
      .def(
          "__init__",
          [](ScaledVectors* self, uintptr_t factors, int64_t cols, bool by_column) {
            new (self) ScaledVectors(pointer<const double>(factors), cols, by_column);
          },
          nb::kw_only(), "factors"_a, "cols"_a, "by_column"_a);
  nb::class_<ReplacedRows, Change>(m, "ReplacedRows")
      .def(
          "__init__",
          [](ReplacedRows* self, SourcePtr source, const std::vector<int64_t>& rows,
             const std::vector<int64_t>& source_rows, int64_t cols) {
            std::vector<ReplacedRows::Pair> pairs;
            for (size_t i = 0; i < rows.size(); i++)
              pairs.push_back({.row = rows[i], .source_row = source_rows.at(i)});
            new (self) ReplacedRows(std::move(source), std::move(pairs), cols);
          },
          nb::kw_only(), "source"_a, "rows"_a, "source_rows"_a, "cols"_a);
  nb::class_<ChangedSource, Source>(m, "ChangedSource")
      .def(
          "__init__",
          [](ChangedSource* self, SourcePtr source, std::vector<ChangePtr> changes) {
            new (self) ChangedSource(std::move(source), std::move(changes));
          },
          nb::kw_only(), "source"_a, "changes"_a);
}

void define_boxes(nb::module_& m) {
  nb::class_<BoxesSource, Source>(m, "BoxesSource")
      .def(
          "__init__",
          [](BoxesSource* self, std::vector<SourcePtr> sources, const Table& table,
             std::vector<int64_t> shape, int64_t type, int64_t wide) {
            if (table.shape(1) != 2 + 4 * shape.size())
              throw std::invalid_argument("BoxesSource: the table must be [P, 2 + 4 D]");
            const BoxTable boxes{table.data(), int64_t(table.shape(0)), std::move(shape)};
            new (self) BoxesSource(std::move(sources), boxes, dtype(type), wide);
          },
          nb::kw_only(), "sources"_a, "table"_a.noconvert(), "shape"_a, "type"_a, "wide"_a);
}

}  // namespace

void define_sources(nb::module_& m) {
  nb::class_<Source>(m, "Source");
  nb::class_<PlainSource, Source>(m, "PlainSource")
      .def(
          "__init__",
          [](PlainSource* self, int64_t file, int64_t offset, int64_t stored) {
            new (self) PlainSource(file, offset, dtype(stored));
          },
          nb::kw_only(), "file"_a, "offset"_a, "stored"_a);
  m.def(
      "scratch_bytes",
      [](const SourcePtr& source, int64_t elements) { return source->scratch_bytes(elements); },
      nb::kw_only(), "source"_a, "elements"_a);
  define_codes(m);
  define_changes(m);
  define_boxes(m);
}
