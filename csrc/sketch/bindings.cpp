// merit_fast._C: the sketch kernels' Python door.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <tuple>

#include "bindings.h"

namespace nb = nanobind;

namespace {

using Matrix = std::tuple<uintptr_t, bool, int64_t, int64_t>;  // address, bf16, columns, row stride
using Place = std::tuple<int64_t, int64_t, int64_t>;  // first row, first column, all columns
using Scale = std::tuple<uintptr_t, int64_t>;         // address or 0, row stride
using Output =
    std::tuple<uintptr_t, int64_t, int64_t, int>;  // address, examples, proj_dim, threads

SketchMatrix matrix(const Matrix& m) {
  return {reinterpret_cast<const void*>(std::get<0>(m)), std::get<1>(m), std::get<2>(m),
          std::get<3>(m)};
}

SketchTarget target(uintptr_t offsets, const Place& place, uint64_t key, const Scale& scale,
                    const Output& output) {
  const auto [out, examples, proj_dim, threads] = output;
  const int64_t buckets = proj_dim / 4096;
  if (buckets < 1 || proj_dim % 4096 || threads < 1)
    throw std::invalid_argument("sketch: bad proj_dim or threads");
  // Whole examples where they come out even, else each is shared by all threads.
  const int64_t parts = examples % threads == 0 ? 1 : threads < buckets ? threads : buckets;
  return {reinterpret_cast<const int64_t*>(offsets),
          examples,
          std::get<0>(place),
          std::get<1>(place),
          std::get<2>(place),
          key,
          proj_dim,
          reinterpret_cast<const float*>(std::get<0>(scale)),
          std::get<1>(scale),
          reinterpret_cast<float*>(out),
          int(parts),
          threads};
}

}  // namespace

void define_sketch(nb::module_& m, const Level& level) {
  m.def("sketch_rows",
        [&level](const Matrix& x, uintptr_t offsets, uintptr_t row_ids, const Place& place,
                 uint64_t key, const Scale& scale, const Output& output) {
          const SketchRows job{target(offsets, place, key, scale, output), matrix(x),
                               reinterpret_cast<const int64_t*>(row_ids)};
          nb::gil_scoped_release release;
          level.sketch_rows(job);
        });

  m.def("sketch_linear", [&level](const Matrix& dy, const Matrix& x, uintptr_t offsets,
                                  const Place& place, uint64_t key, const Scale& scale,
                                  const Output& output) {
    LinearSketch job{target(offsets, place, key, scale, output), matrix(dy), matrix(x), nullptr};
    nb::gil_scoped_release release;
    const std::align_val_t line{64};
    job.scratch = static_cast<uint32_t*>(operator new[](
        size_t(kLinearScratch) * 4 * size_t(job.threads), line));
    level.sketch_linear(job);
    operator delete[](job.scratch, line);
  });

  m.def("token_sums", [&level](const Matrix& dy, const Matrix& x, uintptr_t offsets,
                               int64_t examples, double epsilon, uintptr_t out, int threads) {
    if (threads < 1) throw std::invalid_argument("token_sums: bad threads");
    const TokenSums job{matrix(dy),
                        matrix(x),
                        reinterpret_cast<const int64_t*>(offsets),
                        examples,
                        epsilon >= 0,
                        float(epsilon),
                        reinterpret_cast<float*>(out),
                        threads};
    nb::gil_scoped_release release;
    level.token_sums(job);
  });
}
