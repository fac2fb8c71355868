// One input of a merge: a tensor's bytes in a file, or values made of them on the way in.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "levels/levels.h"

// Reads n bytes at an offset of a file that is no descriptor (an object store's); returns 0 or an errno.
typedef std::function<int(int64_t file, int64_t offset, int64_t n, char* out)> RemoteRead;

// Elements of one byte, 8-bit floats as in the OCP specification (E4M3 without infinities), times a block's scale.
struct Scales {
  bool e5m2;
  int64_t cols, block_rows, block_cols, scale_cols;
  const double* values;  // [ceil(rows / block_rows), scale_cols]
};

// A low-rank update: factor * left [rows, rank] @ right [rank, cols] is added to what the file holds.
struct LowRank {
  const float *left, *right;
  int64_t rank, cols;
  double factor;
};

struct Source {
  int64_t file;                   // a descriptor, or -1 - number of a remote file
  int64_t offset;                 // bytes
  DType stored;                   // unless it has scales
  std::vector<Scales> scales;     // none or one
  std::vector<LowRank> low_rank;  // none or one

  size_t stored_bytes() const { return scales.empty() ? item_bytes(stored) : 1; }
  DType type() const { return scales.empty() && low_rank.empty() ? stored : DType::F64; }
};

const int kTruncated = 61;  // ENODATA: the file ends before its header says

int read_all(int fd, char* p, size_t n, int64_t at);

// To an offset of a file, or with fd -1 to an address. early: the disk gets it at once, so that an fsync has less to do.
int write_all(int fd, const char* p, size_t n, int64_t at, bool early);

// Elements first .. first + n as source.type() into buffer. scratch: 16 n bytes. Returns 0 or an errno.
int read_source(const Level& level, const RemoteRead& remote, const Source& source, int64_t first,
                int64_t n, char* buffer, char* scratch);
