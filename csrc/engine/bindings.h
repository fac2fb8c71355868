// Arguments that all merges of files share, as Python passes them.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cerrno>
#include <stdexcept>

#include "engine/streaming.h"

// [1], grows while the merge runs.
using Counter =
    nanobind::ndarray<int64_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// read(file, offset, bytes, address) -> errno. Workers call it with the GIL held.
inline RemoteRead remote_read(const nanobind::object& read) {
  return [read](int64_t file, int64_t offset, int64_t n, char* out) {
    const nanobind::gil_scoped_acquire acquire;
    if (read.is_none()) return EBADF;
    try {
      return nanobind::cast<int>(read(file, offset, n, reinterpret_cast<uintptr_t>(out)));
    } catch (nanobind::python_error&) {
      return EIO;
    }
  };
}

// Arguments that both merges share.
struct Settings {
  const nanobind::object& read;
  int64_t chunk_elements;
  int threads;
  bool allow_nonfinite, write_early;
  Written* written;
  int64_t kept_bytes = 0;
};

template <class Merge>
MergeResult run(const AverageKernels& kernels, const Settings& settings, Counter& elements_done,
                const Merge& merge) {
  if (settings.chunk_elements < 1 || settings.threads < 1 || elements_done.size() != 1)
    throw std::invalid_argument("merge: bad chunk_elements, threads or elements_done");
  const RemoteRead remote = remote_read(settings.read);
  WideRuns wide_runs;
  const Engine engine{.kernels = kernels,
                      .remote = remote,
                      .chunk_elements = settings.chunk_elements,
                      .threads = settings.threads,
                      .allow_nonfinite = settings.allow_nonfinite,
                      .write_early = settings.write_early,
                      .kept_bytes = settings.kept_bytes,
                      .elements_done = elements_done.data(),
                      .written = settings.written,
                      .wide_runs = &wide_runs};
  const nanobind::gil_scoped_release release;
  return merge(engine);
}

// Adds the merges by element and by vector.
void define_elements(nanobind::module_& m, const AverageKernels& kernels);
