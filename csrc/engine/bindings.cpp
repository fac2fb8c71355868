// merit_fast._C: merges of files. Arrays come as DLPack with noconvert, since a converted copy
// would lose the output.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <stdexcept>
#include <utility>

#include "common/bindings.h"
#include "engine/bindings.h"
#include "engine/streaming.h"
#include "engine/write/bindings.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

// [P, 3]: segment, first element, elements.
using Pieces = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// [P, branches, branches].
using Grams = nb::ndarray<double, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
// [n] elements of a source.
using Values = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void check_segment(const Segment& s) {
  if (s.elements < 1 || s.inputs.empty() || s.weights.size() > s.inputs.size())
    throw std::invalid_argument(
        "merge: a segment needs elements, inputs and at most as many weights");
}

void check_rule(const TensorRule& r, size_t branches) {
  const auto fits = [&](size_t size) { return size == 0 || size == branches; };
  if (r.weight.size() != branches || !fits(r.top.size()) || r.keep.size() != r.top.size() ||
      !fits(r.stream.size()) || r.density.size() != r.stream.size() ||
      r.epsilon.size() != r.stream.size())
    throw std::invalid_argument("merge_deltas: a rule needs one entry per branch");
}

GramJob gram_job(const Pieces& pieces, const Grams& gram, bool from_base, size_t inputs) {
  const size_t branches = gram.shape(1);
  if (pieces.shape(1) != 3 || gram.shape(0) != pieces.shape(0) || gram.shape(2) != branches ||
      branches + (from_base ? 1 : 0) > inputs)
    throw std::invalid_argument("merge: pieces must be [P, 3] and gram [P, branches, branches]");
  GramJob job{.pieces = {}, .branches = int(branches), .from_base = from_base, .gram = gram.data()};
  for (size_t p = 0; p < pieces.shape(0); p++)
    job.pieces.push_back(
        {.segment = pieces(p, 0), .first = pieces(p, 1), .elements = pieces(p, 2)});
  return job;
}

void define_segment(nb::module_& m) {
  nb::class_<Segment>(m, "Segment")
      .def(
          "__init__",
          [](Segment* self, int64_t elements, int output_fd, int64_t output_offset,
             int64_t output_type, std::vector<SourcePtr> inputs, std::vector<double> weights) {
            Segment segment{.elements = elements,
                            .output_fd = output_fd,
                            .output_offset = output_offset,
                            .output_type = dtype(output_type),
                            .inputs = std::move(inputs),
                            .weights = std::move(weights)};
            check_segment(segment);
            new (self) Segment(std::move(segment));
          },
          nb::kw_only(), "elements"_a, "output_fd"_a, "output_offset"_a, "output_type"_a,
          "inputs"_a, "weights"_a);
  nb::class_<MergeResult>(m, "MergeResult")
      .def_ro("error", &MergeResult::error)
      .def_ro("segment", &MergeResult::segment)
      .def_ro("element", &MergeResult::element)
      .def_ro("input", &MergeResult::input)
      .def_ro("nonfinite", &MergeResult::nonfinite);
}

void define_written(nb::module_& m) {
  nb::class_<Written>(m, "Written")
      .def(nb::init<>())
      .def("add", &Written::add, "first"_a, "n"_a)
      .def("prefix", &Written::prefix);
}

// The fields of DeltaRule in kernels/average/deltas.py.
void define_rule(nb::module_& m) {
  nb::class_<TensorRule>(m, "TensorRule")
      .def(
          "__init__",
          [](TensorRule* self, std::vector<double> weight, std::vector<int64_t> top,
             std::vector<int64_t> keep, double variance_share, std::vector<uint64_t> stream,
             std::vector<double> density, std::vector<double> epsilon, bool divide,
             bool restore_sizes, int64_t row, bool elect, bool normalize, bool weigh_by_squares,
             double scale) {
            new (self) TensorRule{.weight = std::move(weight),
                                  .top = std::move(top),
                                  .keep = std::move(keep),
                                  .variance_share = variance_share,
                                  .stream = std::move(stream),
                                  .density = std::move(density),
                                  .epsilon = std::move(epsilon),
                                  .divide = divide,
                                  .restore_sizes = restore_sizes,
                                  .row = row,
                                  .elect = elect,
                                  .normalize = normalize,
                                  .weigh_by_squares = weigh_by_squares,
                                  .scale = scale};
          },
          nb::kw_only(), "weight"_a, "top"_a, "keep"_a, "variance_share"_a, "stream"_a, "density"_a,
          "epsilon"_a, "divide"_a, "restore_sizes"_a, "row"_a, "elect"_a, "normalize"_a,
          "weigh_by_squares"_a, "scale"_a);
}

}  // namespace

void define_engine(nb::module_& m, const AverageKernels& kernels) {
  define_sources(m);
  define_encoding(m);
  define_written(m);
  define_segment(m);
  define_rule(m);
  define_elements(m, kernels);

  m.def(
      "read_values",
      [&kernels](const SourcePtr& source, const nb::object& read, int64_t first, Values out) {
        const RemoteRead remote = remote_read(read);
        const int64_t n = int64_t(out.size());
        const nb::gil_scoped_release release;
        std::vector<char> scratch(double_scratch(*source, n) + 64);
        const uintptr_t start = reinterpret_cast<uintptr_t>(scratch.data());
        char* aligned = scratch.data() + (64 - start % 64) % 64;
        return read_doubles({kernels, remote}, *source, first, n, out.data(), aligned);
      },
      nb::kw_only(), "source"_a, "read"_a.none(), "first"_a, "out"_a.noconvert());
  m.def(
      "merge_sums",
      [&kernels](const std::vector<Segment>& segments, const nb::object& read,
                 int64_t chunk_elements, int threads, bool allow_nonfinite, bool write_early,
                 Written* written, const Pieces& pieces, const Grams& gram, bool from_base,
                 Counter elements_done) {
        const size_t inputs = segments.empty() ? 1 : segments[0].inputs.size();
        const GramJob grams = gram_job(pieces, gram, from_base, inputs);
        return run(kernels, {read, chunk_elements, threads, allow_nonfinite, write_early, written},
                   elements_done,
                   [&](const Engine& engine) { return merge_sums(engine, segments, grams); });
      },
      nb::kw_only(), "segments"_a, "read"_a.none(), "chunk_elements"_a, "threads"_a,
      "allow_nonfinite"_a, "write_early"_a, "written"_a.none(), "pieces"_a.noconvert(),
      "gram"_a.noconvert(), "from_base"_a, "elements_done"_a.noconvert());
  m.def(
      "merge_deltas",
      [&kernels](const std::vector<Segment>& tensors, const std::vector<TensorRule>& rules,
                 const nb::object& read, int64_t chunk_elements, int threads, bool allow_nonfinite,
                 bool write_early, Written* written, int64_t kept_bytes, const Pieces& pieces,
                 const Grams& gram, Counter elements_done) {
        if (tensors.empty() || rules.size() != tensors.size())
          throw std::invalid_argument("merge_deltas: needs tensors, and one rule for each");
        for (size_t t = 0; t < tensors.size(); t++)
          check_rule(rules[t], tensors[t].inputs.size() - 1);
        const GramJob grams = gram_job(pieces, gram, true, tensors[0].inputs.size());
        return run(
            kernels,
            {read, chunk_elements, threads, allow_nonfinite, write_early, written, kept_bytes},
            elements_done,
            [&](const Engine& engine) { return merge_deltas(engine, tensors, rules, grams); });
      },
      nb::kw_only(), "tensors"_a, "rules"_a, "read"_a.none(), "chunk_elements"_a, "threads"_a,
      "allow_nonfinite"_a, "write_early"_a, "written"_a.none(), "kept_bytes"_a,
      "pieces"_a.noconvert(), "gram"_a.noconvert(), "elements_done"_a.noconvert());
}
