#include "engine/read/source.h"

namespace {

// Bytes that one more call costs the time of: to the page cache, and to an object store.
const int64_t kLocalCall = 2048;
const int64_t kRemoteCall = 1 << 20;

}  // namespace

int64_t PlainSource::worthwhile_gap() const {
  return (file_ >= 0 ? kLocalCall : kRemoteCall) / int64_t(item_bytes(stored_));
}

int PlainSource::read(const Reading& reading, int64_t first, int64_t n, char* out, char*) const {
  const int64_t item = int64_t(item_bytes(stored_));
  return read_bytes(reading.remote, file_, offset_ + first * item, n * item, out);
}

void widen(const AverageKernels& kernels, const void* data, DType type, int64_t n, double* out) {
  const double weight = 1.0;
  kernels.weighted_average(&data, &type, &weight, 1, out, DType::F64, n);
}

size_t double_scratch(const Source& source, int64_t n) {
  const bool is_wide = source.type() == DType::F64;
  const size_t narrow = is_wide ? 0 : round_up(size_t(n) * item_bytes(source.type()));
  return narrow + round_up(source.scratch_bytes(n));
}

int read_doubles(const Reading& reading, const Source& source, int64_t first, int64_t n,
                 double* out, char* scratch) {
  if (source.type() == DType::F64)
    return source.read(reading, first, n, reinterpret_cast<char*>(out), scratch);
  const size_t narrow = round_up(size_t(n) * item_bytes(source.type()));
  const int error = source.read(reading, first, n, scratch, scratch + narrow);
  if (!error) widen(reading.kernels, scratch, source.type(), n, out);
  return error;
}
