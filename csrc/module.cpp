// merit_fast._C: the choice of ISA level and the Python door. No torch headers; tensors come as addresses whose dtype,
// shape and contiguity the Python side has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "levels.h"
#include "module.h"

namespace nb = nanobind;

namespace {

#define MERIT_LEVEL(name) \
  Level{#name, level_##name::sketch_rows, level_##name::sketch_linear, level_##name::weighted_average, \
        level_##name::delta_gram, level_##name::delta_sizes, level_##name::count_sizes,                \
        level_##name::pick_sizes, level_##name::mix_deltas, level_##name::kept_squares,                \
        level_##name::low_rank_rows}

Level choose_level() {
  const char* environment = std::getenv("MERIT_FAST_SIMD");
  const std::string forced = environment ? environment : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (forced.empty() || forced == "avx512")) return MERIT_LEVEL(avx512);
  if (avx2 && (forced.empty() || forced == "avx2")) return MERIT_LEVEL(avx2);
#endif
  if (forced.empty() || forced == "generic") return MERIT_LEVEL(generic);
  throw std::invalid_argument("MERIT_FAST_SIMD=" + forced +
                              ": must be generic, avx2 or avx512 and supported by this CPU");
}

}  // namespace

NB_MODULE(_C, m) {
  static const Level level = choose_level();
  m.def("simd_level", [] { return std::string(level.name); });

  m.def("sketch_rows", [](uintptr_t x, bool bf16, int64_t batch, int64_t rows, int64_t cols, int64_t batch_stride,
                          int64_t row_stride, uintptr_t row_ids, int64_t first_row, uint64_t key, int64_t proj_dim,
                          uintptr_t out, int threads) {
    if (proj_dim < 16 || proj_dim % 16 || threads < 1)
      throw std::invalid_argument("sketch_rows: bad proj_dim or threads");
    const SketchRows job{reinterpret_cast<const void*>(x), bf16, batch, rows, cols, batch_stride, row_stride,
                         reinterpret_cast<const int64_t*>(row_ids), first_row, key, proj_dim,
                         reinterpret_cast<float*>(out), threads};
    nb::gil_scoped_release release;
    level.sketch_rows(job);
  });

  m.def("sketch_linear", [](uintptr_t dy_t, uintptr_t x, int64_t batch, int64_t tokens, int64_t rows, int64_t cols,
                            uint64_t key, int64_t proj_dim, uintptr_t out, int threads) {
    if (proj_dim < 16 || proj_dim % 16 || cols % 16 || threads < 1)
      throw std::invalid_argument("sketch_linear: bad proj_dim, cols or threads");
    const LinearSketch job{reinterpret_cast<const float*>(dy_t), reinterpret_cast<const float*>(x), batch, tokens, rows,
                           cols, key, proj_dim, reinterpret_cast<float*>(out), threads};
    nb::gil_scoped_release release;
    level.sketch_linear(job);
  });

  m.def("weighted_average",
        [](std::vector<uintptr_t> inputs, std::vector<int64_t> types, std::vector<double> weights, uintptr_t out,
           int64_t out_type, int64_t n) {
          if (inputs.empty() || inputs.size() != types.size() || inputs.size() != weights.size())
            throw std::invalid_argument("weighted_average: inputs, types and weights must have the same length");
          std::vector<const void*> data;
          std::vector<DType> codes;
          for (size_t k = 0; k < inputs.size(); k++) {
            data.push_back(reinterpret_cast<const void*>(inputs[k]));
            codes.push_back(dtype(types[k]));
          }
          const DType out_code = dtype(out_type);
          nb::gil_scoped_release release;
          return level.weighted_average(data.data(), codes.data(), weights.data(), int(data.size()),
                                        reinterpret_cast<void*>(out), out_code, n);
        });

  define_merge(m, level);
}
