// merit_fast._C: both passes of a bf16 head in one call each, where the level has them.
#include <nanobind/nanobind.h>

#include <new>
#include <stdexcept>

#include "common/bindings.h"
#include "cross_entropy/head.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

void define_head(nb::module_& m, const HeadKernels* kernels) {
  m.attr("has_head_passes") = kernels != nullptr;
  if (!kernels) return;
  nb::class_<HeadPass>(m, "HeadPass")
      .def(
          "__init__",
          [](HeadPass* self, uintptr_t hidden, uintptr_t weight, int64_t rows, int64_t tokens,
             int64_t width, int64_t words, int64_t first, uintptr_t bias, double scale,
             double softcap, double sharpness, uintptr_t labels, uintptr_t kept, int64_t kept_words,
             int threads) {
            if (rows < 0 || rows % 16 || tokens > rows || width % 16 || words < 0 || threads < 1)
              throw std::invalid_argument("head: bad shape or threads");
            new (self) HeadPass{.hidden = pointer<const uint16_t>(hidden),
                                .weight = pointer<const uint16_t>(weight),
                                .rows = rows,
                                .tokens = tokens,
                                .width = width,
                                .words = words,
                                .first = first,
                                .bias = pointer<const float>(bias),
                                .scale = float(scale),
                                .softcap = float(softcap),
                                .sharpness = float(sharpness),
                                .labels = pointer<const int64_t>(labels),
                                .kept = pointer<uint16_t>(kept),
                                .kept_words = kept_words,
                                .threads = threads};
          },
          nb::kw_only(), "hidden"_a, "weight"_a, "rows"_a, "tokens"_a, "width"_a, "words"_a,
          "first"_a, "bias"_a, "scale"_a, "softcap"_a, "sharpness"_a, "labels"_a, "kept"_a,
          "kept_words"_a, "threads"_a);

  m.def(
      "head_forward",
      [kernels](const HeadPass& head, uintptr_t state, int64_t stride, bool statistics) {
        const HeadForward job{head, pointer<double>(state), stride, statistics};
        nb::gil_scoped_release release;
        kernels->forward(job);
      },
      nb::kw_only(), "head"_a, "state"_a, "stride"_a, "statistics"_a);

  m.def(
      "head_backward",
      [kernels](const HeadPass& head, uintptr_t token_pairs, uintptr_t terms, uintptr_t d_hidden,
                uintptr_t d_weight, uintptr_t d_bias) {
        const HeadBackward job{head,
                               pointer<const uint16_t>(token_pairs),
                               pointer<const float>(terms),
                               pointer<float>(d_hidden),
                               pointer<uint16_t>(d_weight),
                               pointer<float>(d_bias)};
        nb::gil_scoped_release release;
        kernels->backward(job);
      },
      nb::kw_only(), "head"_a, "token_pairs"_a, "terms"_a, "d_hidden"_a, "d_weight"_a, "d_bias"_a);
}
