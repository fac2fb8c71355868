// Sources whose stored codes are decoded to float64 while they are read. Every format is a subclass
// of CodedSource, bound in bindings.cpp and made by merge/engine/compiled/sources.py.
#pragma once
#include <cstdint>

#include "engine/read/source.h"

class CodedSource : public Source {
 public:
  DType type() const override { return DType::F64; }
  int64_t worthwhile_gap() const override { return 256; }
};

// Elements of one byte, 8-bit floats as the OCP specification has them (E4M3 without infinities),
// times a scale per block. The grid of scales lies in memory: a format of which it may be large
// holds it as another Source instead, and reads it chunk by chunk.
class Float8Source : public CodedSource {
 public:
  struct Scales {
    int64_t cols, block_rows, block_cols, scale_cols;
    const double* values;  // [ceil(rows / block_rows), scale_cols]
  };

  Float8Source(int64_t file, int64_t offset, bool e5m2, const Scales& scales)
      : file_(file), offset_(offset), e5m2_(e5m2), scales_(scales) {}

  size_t scratch_bytes(int64_t n) const override { return size_t(n); }
  int read(const Reading& reading, int64_t first, int64_t n, char* out,
           char* scratch) const override;

 private:
  int64_t file_, offset_;
  bool e5m2_;
  Scales scales_;
};
