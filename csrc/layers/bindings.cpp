// merit_fast._C: norms, gated activations and rotary positions.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/bindings.h"
#include "layers/layers.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using MaybeMatrix = std::optional<LayerMatrix>;

const LayerMatrix kAbsent = {.data = nullptr, .bf16 = false, .stride = 0};

Activation activation(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("gated: unknown activation " + std::to_string(code));
  return Activation(code);
}

void define_structs(nb::module_& m) {
  nb::class_<LayerMatrix>(m, "LayerMatrix")
      .def(
          "__init__",
          [](LayerMatrix* self, uintptr_t data, bool bf16, int64_t stride) {
            new (self) LayerMatrix{.data = pointer<void>(data), .bf16 = bf16, .stride = stride};
          },
          nb::kw_only(), "data"_a, "bf16"_a, "stride"_a);
  nb::class_<RopeHeads>(m, "RopeHeads")
      .def(
          "__init__",
          [](RopeHeads* self, uintptr_t data, bool bf16, int64_t heads, int64_t batch_stride,
             int64_t head_stride, int64_t token_stride) {
            new (self) RopeHeads{.data = pointer<void>(data),
                                 .bf16 = bf16,
                                 .heads = heads,
                                 .batch_stride = batch_stride,
                                 .head_stride = head_stride,
                                 .token_stride = token_stride};
          },
          nb::kw_only(), "data"_a, "bf16"_a, "heads"_a, "batch_stride"_a, "head_stride"_a,
          "token_stride"_a);
}

void define_norm(nb::module_& m, const LayerKernels& kernels) {
  m.def(
      "norm",
      [&kernels](int64_t rows, int64_t cols, const LayerMatrix& x, MaybeMatrix residual,
                 MaybeMatrix total, const LayerMatrix& out, uintptr_t scale, double epsilon,
                 bool round_first, int threads) {
        const NormJob job{.rows = rows,
                          .cols = cols,
                          .x = x,
                          .residual = residual.value_or(kAbsent),
                          .total = total.value_or(kAbsent),
                          .out = out,
                          .scale = pointer<const float>(scale),
                          .epsilon = float(epsilon),
                          .round_first = round_first,
                          .threads = threads};
        nb::gil_scoped_release release;
        kernels.norm(job);
      },
      nb::kw_only(), "rows"_a, "cols"_a, "x"_a, "residual"_a.none(), "total"_a.none(), "out"_a,
      "scale"_a, "epsilon"_a, "round_first"_a, "threads"_a);

  m.def(
      "norm_backward",
      [&kernels](int64_t rows, int64_t cols, const LayerMatrix& dout, const LayerMatrix& x,
                 MaybeMatrix dtotal, const LayerMatrix& dx, uintptr_t scale, double epsilon,
                 uintptr_t dscale, int threads) {
        nb::gil_scoped_release release;
        std::unique_ptr<float[]> sums;
        if (dscale) sums.reset(new float[size_t((rows + kNormRows - 1) / kNormRows * cols)]);
        kernels.norm_backward({.rows = rows,
                               .cols = cols,
                               .dout = dout,
                               .x = x,
                               .dtotal = dtotal.value_or(kAbsent),
                               .dx = dx,
                               .scale = pointer<const float>(scale),
                               .epsilon = float(epsilon),
                               .sums = sums.get(),
                               .dscale = pointer<float>(dscale),
                               .threads = threads});
      },
      nb::kw_only(), "rows"_a, "cols"_a, "dout"_a, "x"_a, "dtotal"_a.none(), "dx"_a, "scale"_a,
      "epsilon"_a, "dscale"_a, "threads"_a);
}

void define_gated(nb::module_& m, const LayerKernels& kernels) {
  m.def(
      "gated",
      [&kernels](int64_t rows, int64_t cols, const LayerMatrix& gate, const LayerMatrix& up,
                 const LayerMatrix& out, int kind, int threads) {
        const GatedJob job{.rows = rows,
                           .cols = cols,
                           .gate = gate,
                           .up = up,
                           .out = out,
                           .dout = kAbsent,
                           .dgate = kAbsent,
                           .dup = kAbsent,
                           .activation = activation(kind),
                           .threads = threads};
        nb::gil_scoped_release release;
        kernels.gated(job);
      },
      nb::kw_only(), "rows"_a, "cols"_a, "gate"_a, "up"_a, "out"_a, "activation"_a, "threads"_a);

  m.def(
      "gated_backward",
      [&kernels](int64_t rows, int64_t cols, const LayerMatrix& dout, const LayerMatrix& gate,
                 const LayerMatrix& up, const LayerMatrix& dgate, const LayerMatrix& dup, int kind,
                 int threads) {
        const GatedJob job{.rows = rows,
                           .cols = cols,
                           .gate = gate,
                           .up = up,
                           .out = kAbsent,
                           .dout = dout,
                           .dgate = dgate,
                           .dup = dup,
                           .activation = activation(kind),
                           .threads = threads};
        nb::gil_scoped_release release;
        kernels.gated(job);
      },
      nb::kw_only(), "rows"_a, "cols"_a, "dout"_a, "gate"_a, "up"_a, "dgate"_a, "dup"_a,
      "activation"_a, "threads"_a);
}

void define_rope(nb::module_& m, const LayerKernels& kernels) {
  m.def(
      "rope",
      [&kernels](int64_t batch, int64_t tokens, int64_t width, int64_t rotary, const RopeHeads& q,
                 const RopeHeads& k, const RopeHeads& q_out, const RopeHeads& k_out,
                 const RopeHeads& cos, const RopeHeads& sin, bool interleaved, bool backward,
                 int threads) {
        const RopeJob job{.batch = batch,
                          .tokens = tokens,
                          .width = width,
                          .rotary = rotary,
                          .in = {q, k},
                          .out = {q_out, k_out},
                          .cos = cos,
                          .sin = sin,
                          .interleaved = interleaved,
                          .backward = backward,
                          .threads = threads};
        nb::gil_scoped_release release;
        kernels.rope(job);
      },
      nb::kw_only(), "batch"_a, "tokens"_a, "width"_a, "rotary"_a, "q"_a, "k"_a, "q_out"_a,
      "k_out"_a, "cos"_a, "sin"_a, "interleaved"_a, "backward"_a, "threads"_a);
}

}  // namespace

void define_layers(nb::module_& m, const LayerKernels& kernels) {
  define_structs(m);
  define_norm(m, kernels);
  define_gated(m, kernels);
  define_rope(m, kernels);
}
