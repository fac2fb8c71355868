// merit_fast._C: the choice of ISA level and the Python door. No torch headers; tensors come as addresses whose dtype,
// shape and contiguity the Python side has checked, arrays come as DLPack with noconvert (else an output is lost).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>

#include "levels.h"
#include "streaming.h"

namespace nb = nanobind;

namespace {

#define MERIT_LEVEL(name) \
  Level{#name, level_##name::sketch_rows, level_##name::sketch_linear, level_##name::weighted_average, \
        level_##name::delta_gram}

Level choose_level() {
  const char* environment = std::getenv("MERIT_FAST_SIMD");
  const std::string forced = environment ? environment : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (forced.empty() || forced == "avx512")) return MERIT_LEVEL(avx512);
  if (avx2 && (forced.empty() || forced == "avx2")) return MERIT_LEVEL(avx2);
#endif
  if (forced.empty() || forced == "generic") return MERIT_LEVEL(generic);
  throw std::invalid_argument("MERIT_FAST_SIMD=" + forced +
                              ": must be generic, avx2 or avx512 and supported by this CPU");
}

using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counter = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Grams = nb::ndarray<double, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

DType dtype(int64_t code) {
  if (code < 0 || code > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return DType(code);
}

// segments: [S, 4] elements, output fd, output byte offset, output dtype; inputs: [S * K, 3] fd, byte offset, dtype;
// weights: [S, A] of the first A <= K inputs.
std::vector<Segment> unpack(const Matrix& segments, const Matrix& inputs, const Weights& weights) {
  const size_t count = segments.shape(0) ? inputs.shape(0) / segments.shape(0) : 0;
  if (!count || segments.shape(1) != 4 || inputs.shape(1) != 3 || inputs.shape(0) != segments.shape(0) * count ||
      weights.shape(0) != segments.shape(0) || weights.shape(1) > count)
    throw std::invalid_argument("merge_files: segments must be [S, 4], inputs [S * K, 3], weights [S, A] with A <= K");
  std::vector<Segment> unpacked(segments.shape(0));
  for (size_t s = 0; s < unpacked.size(); s++) {
    Segment& segment = unpacked[s];
    segment.elements = segments(s, 0);
    segment.output_fd = int(segments(s, 1));
    segment.output_offset = segments(s, 2);
    segment.output_type = dtype(segments(s, 3));
    for (size_t k = 0; k < count; k++) {
      const size_t row = s * count + k;
      segment.input_fds.push_back(int(inputs(row, 0)));
      segment.input_offsets.push_back(inputs(row, 1));
      segment.input_types.push_back(dtype(inputs(row, 2)));
    }
    for (size_t k = 0; k < weights.shape(1); k++) segment.weights.push_back(weights(s, k));
  }
  return unpacked;
}

}  // namespace

NB_MODULE(_C, m) {
  static const Level level = choose_level();
  m.def("simd_level", [] { return std::string(level.name); });

  m.def("sketch_rows", [](uintptr_t x, bool bf16, int64_t batch, int64_t rows, int64_t cols, int64_t batch_stride,
                          int64_t row_stride, uintptr_t row_ids, int64_t first_row, uint64_t key, int64_t proj_dim,
                          uintptr_t out, int threads) {
    if (proj_dim < 16 || proj_dim % 16 || threads < 1)
      throw std::invalid_argument("sketch_rows: bad proj_dim or threads");
    const SketchRows job{reinterpret_cast<const void*>(x), bf16, batch, rows, cols, batch_stride, row_stride,
                         reinterpret_cast<const int64_t*>(row_ids), first_row, key, proj_dim,
                         reinterpret_cast<float*>(out), threads};
    nb::gil_scoped_release release;
    level.sketch_rows(job);
  });

  m.def("sketch_linear", [](uintptr_t dy_t, uintptr_t x, int64_t batch, int64_t tokens, int64_t rows, int64_t cols,
                            uint64_t key, int64_t proj_dim, uintptr_t out, int threads) {
    if (proj_dim < 16 || proj_dim % 16 || cols % 16 || threads < 1)
      throw std::invalid_argument("sketch_linear: bad proj_dim, cols or threads");
    const LinearSketch job{reinterpret_cast<const float*>(dy_t), reinterpret_cast<const float*>(x), batch, tokens, rows,
                           cols, key, proj_dim, reinterpret_cast<float*>(out), threads};
    nb::gil_scoped_release release;
    level.sketch_linear(job);
  });

  m.def("weighted_average",
        [](std::vector<uintptr_t> inputs, std::vector<int64_t> types, std::vector<double> weights, uintptr_t out,
           int64_t out_type, int64_t n) {
          if (inputs.empty() || inputs.size() != types.size() || inputs.size() != weights.size())
            throw std::invalid_argument("weighted_average: inputs, types and weights must have the same length");
          std::vector<const void*> data;
          std::vector<DType> codes;
          for (size_t k = 0; k < inputs.size(); k++) {
            data.push_back(reinterpret_cast<const void*>(inputs[k]));
            codes.push_back(dtype(types[k]));
          }
          const DType out_code = dtype(out_type);
          nb::gil_scoped_release release;
          return level.weighted_average(data.data(), codes.data(), weights.data(), int(data.size()),
                                        reinterpret_cast<void*>(out), out_code, n);
        });

  // Returns (errno, segment, element, input, nonfinite); elements_done[0] grows while it runs. pieces: [P, 3] segment,
  // first element, elements; gram: [P, branches, branches].
  m.def(
      "merge_files",
      [](const Matrix& segments, const Matrix& inputs, const Weights& weights, int64_t chunk_elements, int threads,
         bool allow_nonfinite, const Matrix& pieces, const Grams& gram, bool from_base, Counter elements_done) {
        if (chunk_elements < 1 || threads < 1 || elements_done.size() != 1)
          throw std::invalid_argument("merge_files: bad chunk_elements, threads or elements_done");
        const std::vector<Segment> unpacked = unpack(segments, inputs, weights);
        const size_t branches = gram.shape(1), needed = branches + (from_base ? 1 : 0);
        if (pieces.shape(1) != 3 || gram.shape(0) != pieces.shape(0) || gram.shape(2) != branches ||
            needed > unpacked[0].input_fds.size())
          throw std::invalid_argument("merge_files: pieces must be [P, 3] and gram [P, branches, branches]");
        GramJob grams{{}, int(branches), from_base, gram.data()};
        for (size_t p = 0; p < pieces.shape(0); p++)
          grams.pieces.push_back({pieces(p, 0), pieces(p, 1), pieces(p, 2)});
        MergeResult r;
        {
          nb::gil_scoped_release release;
          r = merge_files(level, unpacked, chunk_elements, threads, allow_nonfinite, grams, elements_done.data());
        }
        return std::make_tuple(r.error, r.segment, r.element, r.input, r.nonfinite);
      },
      nb::arg("segments").noconvert(), nb::arg("inputs").noconvert(), nb::arg("weights").noconvert(),
      nb::arg("chunk_elements"), nb::arg("threads"), nb::arg("allow_nonfinite"), nb::arg("pieces").noconvert(),
      nb::arg("gram").noconvert(), nb::arg("from_base"), nb::arg("elements_done").noconvert());
}
