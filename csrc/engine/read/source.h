// One input of a merge. The forms are those of merge/read/entries.py, and they nest: a run of
// bytes, codes with scales (codes.h), boxes of other sources (boxes.h), a source with changes
// (changes.h). merge/engine/values.py defines them in NumPy.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "average/average.h"
#include "common/dtypes.h"
#include "engine/read/files.h"

class WideRuns;

// What a source needs while it is read.
struct Reading {
  const AverageKernels& kernels;
  const RemoteRead& remote;
  WideRuns* wide_runs = nullptr;  // null: none are kept
};

inline size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

class Source {
 public:
  virtual ~Source() = default;

  // Type of the elements that `read` gives.
  virtual DType type() const = 0;

  // Bytes that `read` works in for at most n elements.
  virtual size_t scratch_bytes(int64_t n) const = 0;

  // Reads up to so many elements that nobody needs rather than make one more call.
  virtual int64_t worthwhile_gap() const = 0;

  // Reads elements first .. first + n. scratch: aligned to 64 bytes. Returns 0 or an errno.
  virtual int read(const Reading& reading, int64_t first, int64_t n, char* out,
                   char* scratch) const = 0;
};

typedef std::shared_ptr<const Source> SourcePtr;

// A run of bytes of one file.
class PlainSource : public Source {
 public:
  PlainSource(int64_t file, int64_t offset, DType stored)
      : file_(file), offset_(offset), stored_(stored) {}

  DType type() const override { return stored_; }
  size_t scratch_bytes(int64_t) const override { return 0; }
  int64_t worthwhile_gap() const override;
  int read(const Reading& reading, int64_t first, int64_t n, char* out,
           char* scratch) const override;

 private:
  int64_t file_, offset_;  // offset in bytes
  DType stored_;
};

// Reads elements of any source in float64. scratch: double_scratch(source, n) bytes.
int read_doubles(const Reading& reading, const Source& source, int64_t first, int64_t n,
                 double* out, char* scratch);
size_t double_scratch(const Source& source, int64_t n);
void widen(const AverageKernels& kernels, const void* data, DType type, int64_t n, double* out);
