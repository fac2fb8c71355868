#include "levels/levels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

// Each namespace is defined by the level_*.cpp of the same name.
#define MERIT_DECLARE_LEVEL(level)                 \
  namespace level {                                \
  extern const AverageKernels average_kernels;     \
  extern const SketchKernels sketch_kernels;       \
  extern const LossKernels loss_kernels;           \
  extern const OptimizerKernels optimizer_kernels; \
  extern const LayerKernels layer_kernels;         \
  extern const SearchKernels search_kernels;       \
  }
MERIT_DECLARE_LEVEL(level_generic)
#if defined(__x86_64__)
MERIT_DECLARE_LEVEL(level_avx2)
MERIT_DECLARE_LEVEL(level_avx512)
namespace level_avx512_bf16 {
extern const LayerKernels layer_kernels;
extern const SketchKernels sketch_kernels;
extern const HeadKernels head_kernels;
}  // namespace level_avx512_bf16
#endif

namespace {

bool runs_everywhere() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

struct Entry {
  Level level;
  bool (*is_supported)();
};

// Best first.
const Entry kLevels[] = {
#if defined(__x86_64__)
    {.level = {.name = "avx512_bf16",
               .average = level_avx512::average_kernels,
               .sketch = level_avx512_bf16::sketch_kernels,
               .loss = level_avx512::loss_kernels,
               .head = &level_avx512_bf16::head_kernels,
               .optimizer = level_avx512::optimizer_kernels,
               .layers = level_avx512_bf16::layer_kernels,
               .search = level_avx512::search_kernels},
     .is_supported = has_avx512_bf16},
    {.level = {.name = "avx512",
               .average = level_avx512::average_kernels,
               .sketch = level_avx512::sketch_kernels,
               .loss = level_avx512::loss_kernels,
               .head = nullptr,
               .optimizer = level_avx512::optimizer_kernels,
               .layers = level_avx512::layer_kernels,
               .search = level_avx512::search_kernels},
     .is_supported = has_avx512},
    {.level = {.name = "avx2",
               .average = level_avx2::average_kernels,
               .sketch = level_avx2::sketch_kernels,
               .loss = level_avx2::loss_kernels,
               .head = nullptr,
               .optimizer = level_avx2::optimizer_kernels,
               .layers = level_avx2::layer_kernels,
               .search = level_avx2::search_kernels},
     .is_supported = has_avx2},
#endif
    {.level = {.name = "generic",
               .average = level_generic::average_kernels,
               .sketch = level_generic::sketch_kernels,
               .loss = level_generic::loss_kernels,
               .head = nullptr,
               .optimizer = level_generic::optimizer_kernels,
               .layers = level_generic::layer_kernels,
               .search = level_generic::search_kernels},
     .is_supported = runs_everywhere},
};

}  // namespace

const Level& choose_level() {
  const char* environment = std::getenv("MERIT_FAST_SIMD");
  const std::string forced = environment ? environment : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Entry& entry : kLevels)
    if ((forced.empty() || forced == entry.level.name) && entry.is_supported()) return entry.level;
  throw std::invalid_argument(
      "MERIT_FAST_SIMD=" + forced +
      ": must be generic, avx2, avx512 or avx512_bf16 and supported by this CPU");
}
