// merit_fast._C: the steps of linear + cross-entropy between the matrix products.
#include <nanobind/nanobind.h>

#include <new>
#include <stdexcept>

#include "common/bindings.h"
#include "cross_entropy/cross_entropy.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

void define_cross_entropy(nb::module_& m, const LossKernels& kernels) {
  nb::class_<LogitsTile>(m, "LogitsTile")
      .def(
          "__init__",
          [](LogitsTile* self, uintptr_t logits, bool bf16, int64_t rows, int64_t columns,
             int64_t first, uintptr_t bias, double scale, double softcap, double sharpness,
             uintptr_t labels, int threads) {
            if (rows < 0 || columns < 0 || threads < 1)
              throw std::invalid_argument("cross_entropy: bad shape or threads");
            new (self) LogitsTile{.logits = pointer<const void>(logits),
                                  .bf16 = bf16,
                                  .rows = rows,
                                  .columns = columns,
                                  .first = first,
                                  .bias = pointer<const float>(bias),
                                  .scale = float(scale),
                                  .softcap = float(softcap),
                                  .sharpness = float(sharpness),
                                  .labels = pointer<const int64_t>(labels),
                                  .threads = threads};
          },
          nb::kw_only(), "logits"_a, "bf16"_a, "rows"_a, "columns"_a, "first"_a, "bias"_a,
          "scale"_a, "softcap"_a, "sharpness"_a, "labels"_a, "threads"_a);

  m.def(
      "loss_update",
      [&kernels](const LogitsTile& tile, uintptr_t state, int64_t stride, bool statistics) {
        const LossUpdate job{tile, pointer<double>(state), stride, statistics};
        nb::gil_scoped_release release;
        kernels.update(job);
      },
      nb::kw_only(), "tile"_a, "state"_a, "stride"_a, "statistics"_a);

  m.def(
      "loss_gradient",
      [&kernels](const LogitsTile& tile, uintptr_t terms, bool linear, int64_t stride,
                 uintptr_t out) {
        const LossGradient job{tile, pointer<const float>(terms), linear, stride,
                               pointer<void>(out)};
        nb::gil_scoped_release release;
        kernels.gradient(job);
      },
      nb::kw_only(), "tile"_a, "terms"_a, "linear"_a, "stride"_a, "out"_a);
}
