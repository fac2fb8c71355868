// merit_fast._C: the Python door of cross_entropy.h.
#include <nanobind/nanobind.h>

#include "module.h"

namespace nb = nanobind;

void define_cross_entropy(nb::module_& m, const Level& level) {
  (void)m;
  (void)level;
}
