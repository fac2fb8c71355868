#include "engine/source.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>

const int64_t kWriteBack = 8 << 20;  // bytes handed to the disk at a time

static_assert(kTruncated == ENODATA, "kTruncated is ENODATA");

int read_all(int fd, char* p, size_t n, int64_t at) {
  while (n) {
    const ssize_t r = pread(fd, p, n, at);
    if (r < 0 && errno == EINTR) continue;
    if (r < 0) return errno;
    if (r == 0) return kTruncated;
    p += r;
    n -= size_t(r);
    at += r;
  }
  return 0;
}

int write_all(int fd, const char* p, size_t n, int64_t at, bool early) {
  if (fd < 0) {
    std::memcpy(reinterpret_cast<char*>(at), p, n);
    return 0;
  }
  while (n) {
    const ssize_t r = pwrite(fd, p, n, at);
    if (r < 0 && errno == EINTR) continue;
    if (r <= 0) return r < 0 ? errno : EIO;
#ifdef SYNC_FILE_RANGE_WRITE
    const int64_t window = (at + r) / kWriteBack - 1;  // the last one that is complete
    if (early && at / kWriteBack <= window)            // a hint: fsync does the rest
      sync_file_range(fd, window * kWriteBack, kWriteBack, SYNC_FILE_RANGE_WRITE);
#endif
    p += r;
    n -= size_t(r);
    at += r;
  }
  return 0;
}

namespace {

struct Float8Table {
  double values[256];
  Float8Table(int mantissa, int bias, bool infinities) {
    const int exponents = 1 << (7 - mantissa), steps = 1 << mantissa;
    for (int code = 0; code < 256; code++) {
      const int exponent = (code & 127) >> mantissa, fraction = code & (steps - 1);
      double value = exponent ? std::ldexp(1.0 + double(fraction) / steps, exponent - bias)
                              : std::ldexp(double(fraction) / steps, 1 - bias);
      if (infinities && exponent == exponents - 1) value = fraction ? NAN : INFINITY;
      if (!infinities && (code & 127) == 127) value = NAN;
      values[code] = code & 128 ? -value : value;
    }
  }
};

void scale_up(const Scales& s, const uint8_t* x, int64_t first, int64_t n, double* out) {
  static const Float8Table e4m3(3, 7, false), e5m2(2, 15, true);
  const double* table = s.e5m2 ? e5m2.values : e4m3.values;
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = (first + i) / s.cols, col = (first + i) % s.cols;
    out[i] = table[x[i]] * s.values[row / s.block_rows * s.scale_cols + col / s.block_cols];
  }
}

void widen(const AverageKernels& kernels, const void* data, DType type, int64_t n, double* out) {
  const double weight = 1.0;
  kernels.weighted_average(&data, &type, &weight, 1, out, DType::F64, n);
}

}  // namespace

int read_source(const AverageKernels& kernels, const RemoteRead& remote, const Source& source,
                int64_t first, int64_t n, char* buffer, char* scratch) {
  const int64_t item = int64_t(source.stored_bytes());
  const int64_t at = source.offset + first * item;
  char* raw = source.is_decoded() ? scratch : buffer;
  const int error = source.file >= 0 ? read_all(int(source.file), raw, size_t(n * item), at)
                                     : remote(-1 - source.file, at, n * item, raw);
  if (error || !source.is_decoded()) return error;
  double* values = reinterpret_cast<double*>(source.low_rank ? scratch + 8 * n : buffer);
  if (source.scales)
    scale_up(*source.scales, reinterpret_cast<const uint8_t*>(raw), first, n, values);
  else
    widen(kernels, raw, source.stored, n, values);
  if (source.low_rank) {
    const LowRank& l = *source.low_rank;
    kernels.low_rank_rows(values, l.left, l.right, l.rank, l.cols, l.factor, first, n,
                          reinterpret_cast<double*>(buffer));
  }
  return 0;
}
