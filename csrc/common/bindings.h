// Helpers of the bindings. Python passes tensors as addresses, after it has checked dtype, shape
// and contiguity.
#pragma once
#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "common/dtypes.h"

struct AverageKernels;
struct SketchKernels;
struct LossKernels;
struct HeadKernels;
struct OptimizerKernels;
struct LayerKernels;
struct SearchKernels;

void define_average(nanobind::module_& m, const AverageKernels& kernels);
void define_engine(nanobind::module_& m, const AverageKernels& kernels);
void define_header(nanobind::module_& m);
void define_sources(nanobind::module_& m);
void define_sketch(nanobind::module_& m, const SketchKernels& kernels);
void define_cross_entropy(nanobind::module_& m, const LossKernels& kernels);
void define_head(nanobind::module_& m, const HeadKernels* kernels);
void define_optimizer(nanobind::module_& m, const OptimizerKernels& kernels);
void define_layers(nanobind::module_& m, const LayerKernels& kernels);
void define_search(nanobind::module_& m, const SearchKernels& kernels);

// Memory at an address that Python passes as an integer; 0 is null.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype(int64_t code) {
  if (code < 0 || code > 3)
    throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return DType(code);
}
