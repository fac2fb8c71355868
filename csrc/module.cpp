// merit_fast._C: the choice of ISA level and the Python door. No torch headers; tensors come as addresses whose dtype,
// shape and contiguity the Python side has checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "levels/levels.h"
#include "bindings.h"

namespace nb = nanobind;

namespace {

#define MERIT_LEVEL(name)                                                                     \
  Level {                                                                                     \
    #name, &level_##name::loss_kernels, &level_##name::optimizer_kernels,                     \
        &level_##name::layer_kernels, level_##name::sketch_rows, level_##name::sketch_linear, \
        level_##name::token_sums, level_##name::weighted_average, level_##name::delta_gram,   \
        level_##name::delta_sizes, level_##name::count_sizes, level_##name::pick_sizes,       \
        level_##name::mix_deltas, level_##name::kept_squares, level_##name::low_rank_rows     \
  }

Level choose_level() {
  const char* environment = std::getenv("MERIT_FAST_SIMD");
  const std::string forced = environment ? environment : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16") &&
      (forced.empty() || forced == "avx512_bf16")) {
    Level level = MERIT_LEVEL(avx512);
    level.name = "avx512_bf16";
    level.sketch_linear = level_avx512_bf16::sketch_linear;
    return level;
  }
  if (avx512 && (forced.empty() || forced == "avx512")) return MERIT_LEVEL(avx512);
  if (avx2 && (forced.empty() || forced == "avx2")) return MERIT_LEVEL(avx2);
#endif
  if (forced.empty() || forced == "generic") return MERIT_LEVEL(generic);
  throw std::invalid_argument(
      "MERIT_FAST_SIMD=" + forced +
      ": must be generic, avx2, avx512 or avx512_bf16 and supported by this CPU");
}

}  // namespace

NB_MODULE(_C, m) {
  static const Level level = choose_level();
  m.def("simd_level", [] { return std::string(level.name); });

  m.def("weighted_average",
        [](std::vector<uintptr_t> inputs, std::vector<int64_t> types, std::vector<double> weights,
           uintptr_t out, int64_t out_type, int64_t n) {
          if (inputs.empty() || inputs.size() != types.size() || inputs.size() != weights.size())
            throw std::invalid_argument(
                "weighted_average: inputs, types and weights must have the same length");
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

  define_sketch(m, level);
  define_cross_entropy(m, level);
  define_optimizer(m, level);
  define_layers(m, level);
  define_merge(m, level);
}
