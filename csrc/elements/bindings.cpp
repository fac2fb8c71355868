// merit_fast._C: merges that decide by element, row or column.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "common/bindings.h"
#include "elements/elements.h"
#include "engine/bindings.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

ElementKind element_kind(const std::string& name) {
  if (name == "near") return ElementKind::near;
  if (name == "active") return ElementKind::active;
  if (name == "important") return ElementKind::important;
  throw std::invalid_argument("merge_elements: unknown kind " + name);
}

// The fields of ElementRule in kernels/average/elements.py.
void define_element_rule(nb::module_& m) {
  nb::class_<ElementRule>(m, "ElementRule")
      .def(
          "__init__",
          [](ElementRule* self, const std::string& kind, double t, double epsilon, double r,
             double alpha, int64_t row) {
            new (self) ElementRule{.kind = element_kind(kind),
                                   .t = t,
                                   .epsilon = epsilon,
                                   .r = r,
                                   .alpha = alpha,
                                   .row = row};
          },
          nb::kw_only(), "kind"_a, "t"_a, "epsilon"_a, "r"_a, "alpha"_a, "row"_a);
}

// weights(address of gram, vectors, address of weights) -> whether it worked, with the GIL held.
VectorWeights vector_weights(const nb::object& weights) {
  return [weights](const double* gram, int64_t vectors, double* out) {
    const nb::gil_scoped_acquire acquire;
    try {
      return nb::cast<bool>(
          weights(reinterpret_cast<uintptr_t>(gram), vectors, reinterpret_cast<uintptr_t>(out)));
    } catch (nb::python_error&) {
      return false;
    }
  };
}

}  // namespace

void define_elements(nb::module_& m, const AverageKernels& kernels) {
  define_element_rule(m);
  m.def(
      "merge_elements",
      [&kernels](const Segment& tensor, const ElementRule& rule, const nb::object& read,
                 int64_t chunk_elements, int threads, bool allow_nonfinite, bool write_early,
                 Written* written, Counter elements_done) {
        const bool is_pair = rule.kind != ElementKind::active;
        if (tensor.inputs.size() < 2 || (is_pair && tensor.inputs.size() != 2) || rule.row < 0 ||
            (rule.kind == ElementKind::important && rule.row < 1))
          throw std::invalid_argument("merge_elements: bad number of inputs, or a bad row");
        return run(kernels, {read, chunk_elements, threads, allow_nonfinite, write_early, written},
                   elements_done,
                   [&](const Engine& engine) { return merge_elements(engine, tensor, rule); });
      },
      nb::kw_only(), "tensor"_a, "rule"_a, "read"_a.none(), "chunk_elements"_a, "threads"_a,
      "allow_nonfinite"_a, "write_early"_a, "written"_a.none(), "elements_done"_a.noconvert());
  m.def(
      "merge_vectors",
      [&kernels](const Segment& tensor, int64_t length, int64_t period, int branches,
                 bool from_base, const nb::object& weights, const nb::object& read,
                 int64_t chunk_elements, int threads, bool allow_nonfinite, bool write_early,
                 Written* written, Counter elements_done) {
        const int64_t part = period > 0 ? period : length;
        if (part < 1 || tensor.elements % part != 0 || branches < 1 ||
            size_t(branches) + (from_base ? 1 : 0) != tensor.inputs.size())
          throw std::invalid_argument("merge_vectors: vectors must fill the tensor");
        const VectorJob job{.length = length,
                            .period = period,
                            .branches = branches,
                            .from_base = from_base,
                            .weights = vector_weights(weights)};
        return run(kernels, {read, chunk_elements, threads, allow_nonfinite, write_early, written},
                   elements_done,
                   [&](const Engine& engine) { return merge_vectors(engine, tensor, job); });
      },
      nb::kw_only(), "tensor"_a, "length"_a, "period"_a, "branches"_a, "from_base"_a, "weights"_a,
      "read"_a.none(), "chunk_elements"_a, "threads"_a, "allow_nonfinite"_a, "write_early"_a,
      "written"_a.none(), "elements_done"_a.noconvert());
}
