// merit_fast._C: the Python door of layers.h.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <memory>
#include <stdexcept>
#include <tuple>

#include "bindings.h"

namespace nb = nanobind;

namespace {

using Matrix = std::tuple<uintptr_t, bool, int64_t>;  // address or 0, bf16, row stride
using Heads = std::tuple<uintptr_t, bool, int64_t, int64_t, int64_t,
                         int64_t>;  // address, bf16, heads, strides

LayerMatrix matrix(const Matrix& m) {
  return {reinterpret_cast<void*>(std::get<0>(m)), std::get<1>(m), std::get<2>(m)};
}

RopeHeads heads(const Heads& h) {
  return {reinterpret_cast<void*>(std::get<0>(h)),
          std::get<1>(h),
          std::get<2>(h),
          std::get<3>(h),
          std::get<4>(h),
          std::get<5>(h)};
}

const LayerMatrix kNone = {nullptr, false, 0};

Activation activation(int code) {
  if (code < 0 || code > 2)
    throw std::invalid_argument("gated: unknown activation " + std::to_string(code));
  return Activation(code);
}

}  // namespace

void define_layers(nb::module_& m, const Level& level) {
  const LayerKernels* kernels = level.layers;

  m.def("norm", [kernels](int64_t rows, int64_t cols, const Matrix& x, const Matrix& residual,
                          const Matrix& total, const Matrix& out, uintptr_t scale, double epsilon,
                          bool round_first, int threads) {
    const NormJob job{rows,
                      cols,
                      matrix(x),
                      matrix(residual),
                      matrix(total),
                      matrix(out),
                      reinterpret_cast<const float*>(scale),
                      float(epsilon),
                      round_first,
                      threads};
    nb::gil_scoped_release release;
    kernels->norm(job);
  });

  m.def("norm_backward", [kernels](int64_t rows, int64_t cols, const Matrix& dout, const Matrix& x,
                                   const Matrix& dtotal, const Matrix& dx, uintptr_t scale,
                                   double epsilon, uintptr_t dscale, int threads) {
    nb::gil_scoped_release release;
    std::unique_ptr<float[]> sums;
    if (dscale) sums.reset(new float[size_t((rows + kNormRows - 1) / kNormRows * cols)]);
    kernels->norm_backward({rows, cols, matrix(dout), matrix(x), matrix(dtotal), matrix(dx),
                            reinterpret_cast<const float*>(scale), float(epsilon), sums.get(),
                            reinterpret_cast<float*>(dscale), threads});
  });

  m.def("gated", [kernels](int64_t rows, int64_t cols, const Matrix& gate, const Matrix& up,
                           const Matrix& out, int kind, int threads) {
    const GatedJob job{rows,  cols,  matrix(gate), matrix(up),       matrix(out),
                       kNone, kNone, kNone,        activation(kind), threads};
    nb::gil_scoped_release release;
    kernels->gated(job);
  });

  m.def("gated_backward",
        [kernels](int64_t rows, int64_t cols, const Matrix& dout, const Matrix& gate,
                  const Matrix& up, const Matrix& dgate, const Matrix& dup, int kind, int threads) {
          const GatedJob job{rows,         cols,          matrix(gate), matrix(up),       kNone,
                             matrix(dout), matrix(dgate), matrix(dup),  activation(kind), threads};
          nb::gil_scoped_release release;
          kernels->gated(job);
        });

  m.def("rope", [kernels](const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes,
                          const Heads& q, const Heads& k, const Heads& q_out, const Heads& k_out,
                          const Heads& cos, const Heads& sin, bool backward, int threads) {
    const auto [batch, tokens, width, rotary] = sizes;
    const RopeJob job{batch,
                      tokens,
                      width,
                      rotary,
                      {heads(q), heads(k)},
                      {heads(q_out), heads(k_out)},
                      heads(cos),
                      heads(sin),
                      backward,
                      threads};
    nb::gil_scoped_release release;
    kernels->rope(job);
  });
}
