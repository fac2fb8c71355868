// One input of a merge: bytes of a tensor in a file, or values that are decoded from them while
// they are read.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>

#include "average/average.h"
#include "common/dtypes.h"

// Reads n bytes at an offset of a remote file, which has no descriptor; returns 0 or an errno.
typedef std::function<int(int64_t file, int64_t offset, int64_t n, char* out)> RemoteRead;

// Elements of one byte, 8-bit floats as the OCP specification has them (E4M3 without infinities),
// times a scale per block.
struct Scales {
  bool e5m2;
  int64_t cols, block_rows, block_cols, scale_cols;
  const double* values;  // [ceil(rows / block_rows), scale_cols]
};

// A low-rank update: factor * left [rows, rank] @ right [rank, cols] is added to the values of the
// file.
struct LowRank {
  const float *left, *right;
  int64_t rank, cols;
  double factor;
};

struct Source {
  int64_t file;    // a descriptor, or -1 - number of a remote file
  int64_t offset;  // bytes
  DType stored;    // unused with scales
  std::optional<Scales> scales;
  std::optional<LowRank> low_rank;

  bool is_decoded() const { return scales || low_rank; }
  size_t stored_bytes() const { return scales ? 1 : item_bytes(stored); }
  DType type() const { return is_decoded() ? DType::F64 : stored; }
};

const int kTruncated = 61;  // ENODATA: the file is shorter than its header states

int read_all(int fd, char* p, size_t n, int64_t at);

// Writes to an offset of a file, or with fd -1 to an address. early: starts the transfer to the
// disk at once, so that a later fsync has less to do.
int write_all(int fd, const char* p, size_t n, int64_t at, bool early);

// Reads elements first .. first + n into the buffer as source.type(). scratch: 16 n bytes. Returns
// 0 or an errno.
int read_source(const AverageKernels& kernels, const RemoteRead& remote, const Source& source,
                int64_t first, int64_t n, char* buffer, char* scratch);
