// merit_fast._C: the forms of an input. Arrays of numbers come as addresses, which the caller keeps
// alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "common/bindings.h"
#include "engine/read/adapters.h"
#include "engine/read/boxes.h"
#include "engine/read/changes.h"
#include "engine/read/codes.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Table = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void define_codes(nb::module_& m) {
  nb::class_<Float8Source, Source>(m, "Float8Source")
      .def(
          "__init__",
          [](Float8Source* self, int64_t file, int64_t offset, bool e5m2, int64_t cols,
             int64_t block_rows, int64_t block_cols, int64_t scale_cols, uintptr_t scales) {
            new (self) Float8Source(file, offset, e5m2,
                                    {.cols = cols,
                                     .block_rows = block_rows,
                                     .block_cols = block_cols,
                                     .scale_cols = scale_cols,
                                     .values = pointer<const double>(scales)});
          },
          nb::kw_only(), "file"_a, "offset"_a, "e5m2"_a, "cols"_a, "block_rows"_a, "block_cols"_a,
          "scale_cols"_a, "scales"_a);
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
