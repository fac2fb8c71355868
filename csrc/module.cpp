// merit_fast._C: every family's functions at the ISA level chosen for this process. Includes no
// torch headers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "common/bindings.h"
#include "levels/levels.h"

NB_MODULE(_C, m) {
  static const Level& level = choose_level();
  m.def("simd_level", [] { return std::string(level.name); });
  define_average(m, level.average);
  define_sketch(m, level.sketch);
  define_cross_entropy(m, level.loss);
  define_head(m, level.head);
  define_optimizer(m, level.optimizer);
  define_layers(m, level.layers);
  define_search(m, level.search);
  define_engine(m, level.average);
  define_header(m);
}
