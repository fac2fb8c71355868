// The Python door, by family.
#pragma once
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "levels/levels.h"

void define_sketch(nanobind::module_& m, const Level& level);
void define_cross_entropy(nanobind::module_& m, const Level& level);
void define_optimizer(nanobind::module_& m, const Level& level);
void define_layers(nanobind::module_& m, const Level& level);
void define_merge(nanobind::module_& m, const Level& level);

inline DType dtype(int64_t code) {
  if (code < 0 || code > 3)
    throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return DType(code);
}
