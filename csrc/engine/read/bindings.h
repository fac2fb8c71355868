// Sources of merit_fast._C.
#pragma once
#include <nanobind/nanobind.h>

void define_sources(nanobind::module_& m);
