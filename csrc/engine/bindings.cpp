// The Python door of the file merges. Arrays come as DLPack with noconvert (else an output is lost).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <stdexcept>
#include <tuple>

#include "bindings.h"
#include "engine/streaming.h"

namespace nb = nanobind;

namespace {

using Pieces = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counter = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Grams = nb::ndarray<double, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
// elements, output descriptor, output byte offset, output dtype, inputs
using PySegment = std::tuple<int64_t, int, int64_t, int64_t, std::vector<Source>>;
using PyResult = std::tuple<int, int64_t, int64_t, int64_t, bool>;

Segment unpack(const PySegment& s, const std::vector<double>& weights) {
  Segment segment{std::get<0>(s),        std::get<1>(s), std::get<2>(s),
                  dtype(std::get<3>(s)), std::get<4>(s), weights};
  if (segment.elements < 1 || segment.inputs.empty() || weights.size() > segment.inputs.size())
    throw std::invalid_argument(
        "merge: a segment needs elements, inputs and at most as many weights");
  return segment;
}

GramJob unpack(const Pieces& pieces, const Grams& gram, bool from_base, size_t inputs) {
  const size_t branches = gram.shape(1);
  if (pieces.shape(1) != 3 || gram.shape(0) != pieces.shape(0) || gram.shape(2) != branches ||
      branches + (from_base ? 1 : 0) > inputs)
    throw std::invalid_argument("merge: pieces must be [P, 3] and gram [P, branches, branches]");
  GramJob job{{}, int(branches), from_base, gram.data()};
  for (size_t p = 0; p < pieces.shape(0); p++)
    job.pieces.push_back({pieces(p, 0), pieces(p, 1), pieces(p, 2)});
  return job;
}

// read(file, offset, bytes, address) -> errno, called from the workers with the GIL taken.
RemoteRead remote_read(const nb::object& read) {
  return [read](int64_t file, int64_t offset, int64_t n, char* out) {
    const nb::gil_scoped_acquire acquire;
    if (read.is_none()) return EBADF;
    try {
      return nb::cast<int>(read(file, offset, n, reinterpret_cast<uintptr_t>(out)));
    } catch (nb::python_error&) {
      return EIO;
    }
  };
}

PyResult packed(const MergeResult& r) {
  return {r.error, r.segment, r.element, r.input, r.nonfinite};
}

template <class Merge>
PyResult run(const Level& level, const nb::object& read, int64_t chunk_elements, int threads,
             bool allow_nonfinite, bool write_early, Counter& elements_done, const Merge& merge) {
  if (chunk_elements < 1 || threads < 1 || elements_done.size() != 1)
    throw std::invalid_argument("merge: bad chunk_elements, threads or elements_done");
  const RemoteRead remote = remote_read(read);
  const Engine engine{level,           remote,      chunk_elements,      threads,
                      allow_nonfinite, write_early, elements_done.data()};
  MergeResult result;
  {
    const nb::gil_scoped_release release;
    result = merge(engine);
  }
  return packed(result);
}

void check_rule(const TensorRule& r, size_t branches) {
  const auto fits = [&](size_t size) { return size == 0 || size == branches; };
  if (r.weight.size() != branches || !fits(r.top.size()) || r.keep.size() != r.top.size() ||
      !fits(r.stream.size()) || r.density.size() != r.stream.size() ||
      r.epsilon.size() != r.stream.size())
    throw std::invalid_argument("merge_deltas: a rule needs one entry per branch");
}

}  // namespace

void define_merge(nb::module_& m, const Level& level) {
  nb::class_<Source>(m, "Source")
      .def("__init__",
           [](Source* self, int64_t file, int64_t offset, int64_t stored) {
             new (self) Source{file, offset, dtype(stored), {}, {}};
           })
      .def("scale",
           [](Source& self, bool e5m2, int64_t cols, int64_t block_rows, int64_t block_cols,
              int64_t scale_cols, uintptr_t values) {
             self.scales.push_back({e5m2, cols, block_rows, block_cols, scale_cols,
                                    reinterpret_cast<const double*>(values)});
           })
      .def("add_low_rank", [](Source& self, uintptr_t left, uintptr_t right, int64_t rank,
                              int64_t cols, double factor) {
        self.low_rank.push_back({reinterpret_cast<const float*>(left),
                                 reinterpret_cast<const float*>(right), rank, cols, factor});
      });
  nb::class_<TensorRule>(m, "TensorRule")
      .def("__init__",
           [](TensorRule* self, std::vector<double> weight, std::vector<int64_t> top,
              std::vector<int64_t> keep, double variance_share, std::vector<uint64_t> stream,
              std::vector<double> density, std::vector<double> epsilon, int64_t row, bool elect,
              bool normalize, bool weigh_by_squares, double scale) {
             new (self) TensorRule{std::move(weight),
                                   std::move(top),
                                   std::move(keep),
                                   variance_share,
                                   std::move(stream),
                                   std::move(density),
                                   std::move(epsilon),
                                   row,
                                   elect,
                                   normalize,
                                   weigh_by_squares,
                                   scale};
           });

  // Each returns (errno, segment, element, input, nonfinite); elements_done[0] grows while it runs. read: what reads
  // remote files, or None. pieces: [P, 3] segment, first element, elements; gram: [P, branches, branches].
  m.def(
      "merge_sums",
      [&level](const std::vector<PySegment>& segments,
               const std::vector<std::vector<double>>& weights, const nb::object& read,
               int64_t chunk_elements, int threads, bool allow_nonfinite, bool write_early,
               const Pieces& pieces, const Grams& gram, bool from_base, Counter elements_done) {
        std::vector<Segment> unpacked;
        for (size_t s = 0; s < segments.size(); s++)
          unpacked.push_back(unpack(segments[s], weights.at(s)));
        const GramJob grams =
            unpack(pieces, gram, from_base, unpacked.empty() ? 1 : unpacked[0].inputs.size());
        return run(level, read, chunk_elements, threads, allow_nonfinite, write_early,
                   elements_done,
                   [&](const Engine& engine) { return merge_sums(engine, unpacked, grams); });
      },
      nb::arg("segments"), nb::arg("weights"), nb::arg("read").none(), nb::arg("chunk_elements"),
      nb::arg("threads"), nb::arg("allow_nonfinite"), nb::arg("write_early"),
      nb::arg("pieces").noconvert(), nb::arg("gram").noconvert(), nb::arg("from_base"),
      nb::arg("elements_done").noconvert());
  m.def(
      "merge_deltas",
      [&level](const PySegment& tensor, const TensorRule& rule, const nb::object& read,
               int64_t chunk_elements, int threads, bool allow_nonfinite, bool write_early,
               const Pieces& pieces, const Grams& gram, Counter elements_done) {
        const Segment unpacked = unpack(tensor, {});
        check_rule(rule, unpacked.inputs.size() - 1);
        const GramJob grams = unpack(pieces, gram, true, unpacked.inputs.size());
        return run(
            level, read, chunk_elements, threads, allow_nonfinite, write_early, elements_done,
            [&](const Engine& engine) { return merge_deltas(engine, unpacked, rule, grams); });
      },
      nb::arg("tensor"), nb::arg("rule"), nb::arg("read").none(), nb::arg("chunk_elements"),
      nb::arg("threads"), nb::arg("allow_nonfinite"), nb::arg("write_early"),
      nb::arg("pieces").noconvert(), nb::arg("gram").noconvert(),
      nb::arg("elements_done").noconvert());
}
