// merit_fast._C: the Python door of layers.h.
#include <nanobind/nanobind.h>

#include "module.h"

namespace nb = nanobind;

void define_layers(nb::module_& m, const Level& level) {
  (void)m;
  (void)level;
}
