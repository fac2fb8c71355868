// merit_fast._C: sketches of gradients and sums over tokens.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <memory>
#include <new>
#include <optional>
#include <stdexcept>

#include "common/bindings.h"
#include "sketch/sketch.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

const int64_t kBucket = 64 * 64;
const std::align_val_t kCacheLine{64};

struct FreeScratch {
  void operator()(uint32_t* words) const { operator delete[](words, kCacheLine); }
};

// Whole examples if they divide evenly among the threads; else all threads share each example.
int parts_of(int64_t examples, int64_t buckets, int threads) {
  if (examples % threads == 0) return 1;
  return int(threads < buckets ? threads : buckets);
}

void define_structs(nb::module_& m) {
  nb::class_<SketchMatrix>(m, "SketchMatrix")
      .def(
          "__init__",
          [](SketchMatrix* self, uintptr_t data, bool bf16, int64_t cols, int64_t row_stride) {
            new (self) SketchMatrix{.data = pointer<const void>(data),
                                    .bf16 = bf16,
                                    .cols = cols,
                                    .row_stride = row_stride};
          },
          nb::kw_only(), "data"_a, "bf16"_a, "cols"_a, "row_stride"_a);
  nb::class_<SketchTarget>(m, "SketchTarget")
      .def(
          "__init__",
          [](SketchTarget* self, uintptr_t offsets, int64_t examples, int64_t first_row,
             int64_t first_col, int64_t all_cols, uint64_t key, int64_t proj_dim,
             int64_t group_rows, uintptr_t scale, int64_t scale_stride, uintptr_t out,
             int threads) {
            const int64_t buckets = proj_dim / kBucket;
            if (buckets < 1 || proj_dim % kBucket || threads < 1 || group_rows < 1 ||
                buckets % group_rows)
              throw std::invalid_argument("sketch: bad proj_dim, group_rows or threads");
            const int64_t group_cols = buckets / group_rows, tiles = (all_cols + 63) / 64;
            new (self) SketchTarget{.offsets = pointer<const int64_t>(offsets),
                                    .examples = examples,
                                    .first_row = first_row,
                                    .first_col = first_col,
                                    .all_cols = all_cols,
                                    .key = key,
                                    .proj_dim = proj_dim,
                                    .group_rows = group_rows,
                                    .group_cols = group_cols,
                                    .groups = (tiles + group_cols - 1) / group_cols,
                                    .scale = pointer<const float>(scale),
                                    .scale_stride = scale_stride,
                                    .out = pointer<float>(out),
                                    .parts = parts_of(examples, buckets, threads),
                                    .threads = threads};
          },
          nb::kw_only(), "offsets"_a, "examples"_a, "first_row"_a, "first_col"_a, "all_cols"_a,
          "key"_a, "proj_dim"_a, "group_rows"_a, "scale"_a, "scale_stride"_a, "out"_a, "threads"_a);
}

}  // namespace

uint32_t* linear_scratch() {
  const size_t words = size_t(64 * kDepth + kPanelWords);
  static thread_local const std::unique_ptr<uint32_t, FreeScratch> memory(
      static_cast<uint32_t*>(operator new[](words * sizeof(uint32_t), kCacheLine)));
  return memory.get();
}

void define_sketch(nb::module_& m, const SketchKernels& kernels) {
  define_structs(m);

  m.def(
      "sketch_rows",
      [&kernels](const SketchMatrix& x, uintptr_t row_ids, const SketchTarget& target) {
        const SketchRows job{target, x, pointer<const int64_t>(row_ids)};
        nb::gil_scoped_release release;
        kernels.rows(job);
      },
      nb::kw_only(), "x"_a, "row_ids"_a, "target"_a);

  m.def(
      "sketch_linear",
      [&kernels](const SketchMatrix& dy, const SketchMatrix& x, const SketchTarget& target) {
        const LinearSketch job{target, dy, x};
        nb::gil_scoped_release release;
        kernels.linear(job);
      },
      nb::kw_only(), "dy"_a, "x"_a, "target"_a);

  m.def(
      "token_sums",
      [&kernels](const SketchMatrix& dy, std::optional<SketchMatrix> x, uintptr_t offsets,
                 int64_t examples, std::optional<double> epsilon, uintptr_t out, int threads) {
        if (threads < 1) throw std::invalid_argument("token_sums: bad threads");
        const SketchMatrix none{.data = nullptr, .bf16 = false, .cols = dy.cols, .row_stride = 0};
        const TokenSums job{.dy = dy,
                            .x = x.value_or(none),
                            .offsets = pointer<const int64_t>(offsets),
                            .examples = examples,
                            .normalize = epsilon.has_value(),
                            .epsilon = float(epsilon.value_or(0.0)),
                            .out = pointer<float>(out),
                            .threads = threads};
        nb::gil_scoped_release release;
        kernels.token_sums(job);
      },
      nb::kw_only(), "dy"_a, "x"_a.none(), "offsets"_a, "examples"_a, "epsilon"_a.none(), "out"_a,
      "threads"_a);
}
