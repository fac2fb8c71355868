// merit_fast._C: the weighted average of arrays.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "average/average.h"
#include "common/bindings.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

void define_average(nb::module_& m, const AverageKernels& kernels) {
  m.def(
      "weighted_average",
      [&kernels](const std::vector<uintptr_t>& inputs, const std::vector<int64_t>& types,
                 const std::vector<double>& weights, uintptr_t out, int64_t out_type,
                 int64_t elements) {
        if (inputs.empty() || inputs.size() != types.size() || inputs.size() != weights.size())
          throw std::invalid_argument(
              "weighted_average: inputs, types and weights must have the same length");
        std::vector<const void*> data;
        std::vector<DType> codes;
        for (size_t k = 0; k < inputs.size(); k++) {
          data.push_back(pointer<const void>(inputs[k]));
          codes.push_back(dtype(types[k]));
        }
        const DType out_code = dtype(out_type);
        nb::gil_scoped_release release;
        return kernels.weighted_average(data.data(), codes.data(), weights.data(), int(data.size()),
                                        pointer<void>(out), out_code, elements);
      },
      nb::kw_only(), "inputs"_a, "types"_a, "weights"_a, "out"_a, "out_type"_a, "elements"_a);
}
