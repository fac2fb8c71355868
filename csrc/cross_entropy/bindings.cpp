// merit_fast._C: the Python door of cross_entropy.h.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>
#include <tuple>

#include "bindings.h"

namespace nb = nanobind;

namespace {

// Address, bf16, rows, columns, first word, bias or 0, softcap or 0, labels, threads.
using Tile =
    std::tuple<uintptr_t, bool, int64_t, int64_t, int64_t, uintptr_t, double, uintptr_t, int>;
using Rows = std::tuple<uintptr_t, int64_t>;  // address of [4, rows], elements from one to the next

LogitsTile logits_tile(const Tile& tile) {
  const auto [logits, bf16, rows, columns, first, bias, softcap, labels, threads] = tile;
  if (rows < 0 || columns < 0 || threads < 1)
    throw std::invalid_argument("cross_entropy: bad shape or threads");
  return {reinterpret_cast<const void*>(logits),
          bf16,
          rows,
          columns,
          first,
          reinterpret_cast<const float*>(bias),
          float(softcap),
          reinterpret_cast<const int64_t*>(labels),
          threads};
}

}  // namespace

void define_cross_entropy(nb::module_& m, const Level& level) {
  m.def("loss_update", [&level](const Tile& tile, const Rows& state) {
    const LossUpdate job{logits_tile(tile), reinterpret_cast<double*>(std::get<0>(state)),
                         std::get<1>(state)};
    nb::gil_scoped_release release;
    level.loss->update(job);
  });

  m.def("loss_gradient", [&level](const Tile& tile, const Rows& terms, uintptr_t out) {
    const LossGradient job{logits_tile(tile), reinterpret_cast<const float*>(std::get<0>(terms)),
                           std::get<1>(terms), reinterpret_cast<void*>(out)};
    nb::gil_scoped_release release;
    level.loss->gradient(job);
  });
}
