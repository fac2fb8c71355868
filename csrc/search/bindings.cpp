// merit_fast._C: inner products of stored rows with vectors.
#include <nanobind/nanobind.h>

#include <stdexcept>

#include "common/bindings.h"
#include "search/search.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

void define_search(nb::module_& m, const SearchKernels& kernels) {
  m.def(
      "row_products",
      [&kernels](uintptr_t rows, int64_t type, int64_t count, int64_t width, int64_t stride,
                 uintptr_t vectors, int64_t num_vectors, uintptr_t out, int threads) {
        const RowProducts job{.rows = pointer<const void>(rows),
                              .type = dtype(type),
                              .count = count,
                              .width = width,
                              .stride = stride,
                              .vectors = pointer<const float>(vectors),
                              .num_vectors = num_vectors,
                              .out = pointer<float>(out),
                              .threads = threads};
        if (job.type == DType::F64) throw std::invalid_argument("row_products: rows are float64");
        nb::gil_scoped_release release;
        kernels.row_products(job);
      },
      nb::kw_only(), "rows"_a, "type"_a, "count"_a, "width"_a, "stride"_a, "vectors"_a,
      "num_vectors"_a, "out"_a, "threads"_a);
}
