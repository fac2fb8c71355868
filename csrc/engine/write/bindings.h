// merit_fast._C: encoding of quantised outputs.
#pragma once
#include <nanobind/nanobind.h>

void define_encoding(nanobind::module_& m);
