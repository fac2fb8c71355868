// What every ISA level provides. The bodies are in sketch.inl and average.inl, compiled once per level
// (level_generic.cpp, level_avx2.cpp, level_avx512.cpp) with contraction off, so all levels give the same bits.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// Codes shared with kernels/average/__init__.py.
enum class DType : int32_t { BF16 = 0, F16 = 1, F32 = 2, F64 = 3 };

inline size_t item_bytes(DType t) { return t == DType::F64 ? 8 : t == DType::F32 ? 4 : 2; }

const int64_t kAverageBlock = 2048;  // two fp64 blocks of it stay in L1

// Doubles that delta_gram needs to work in.
inline size_t gram_scratch(int branches) {
  return size_t(branches + 1) * kAverageBlock + size_t(branches) * size_t(branches) * 8;
}

// A batch of row-major matrices whose rows are hashed as rows `row_ids[b, r]` (or first_row + r) of one parameter.
struct SketchRows {
  const void* x;         // [batch, rows, cols], float or bf16 bits
  bool bf16;
  int64_t batch, rows, cols;
  int64_t batch_stride, row_stride;  // elements
  const int64_t* row_ids;            // [batch, rows], or null
  int64_t first_row;
  uint64_t key;       // of (hash version, seed, parameter name)
  int64_t proj_dim;   // multiple of 16
  float* out;         // [batch, proj_dim], added to
  int threads;
};

// sketch(dY^T X) of a batch of linear layers' calls; dY is given transposed, columns of x are padded to blocks of 16.
struct LinearSketch {
  const float* dy_t;  // [batch, rows, tokens]
  const float* x;     // [batch, tokens, cols]
  int64_t batch, tokens, rows, cols;
  uint64_t key;
  int64_t proj_dim;
  float* out;  // [batch, proj_dim], added to
  int threads;
};

#define MERIT_DECLARE_LEVEL(ns)                                                                              \
  namespace ns {                                                                                             \
  void sketch_rows(const SketchRows& job);                                                                   \
  void sketch_linear(const LinearSketch& job);                                                               \
  bool weighted_average(const void* const* inputs, const DType* types, const double* weights, int count,     \
                        void* out, DType out_type, int64_t n);                                               \
  void delta_gram(const void* const* inputs, const DType* types, int branches, bool from_base,               \
                  int64_t first, int64_t n, double* gram, double* scratch);                                  \
  }
MERIT_DECLARE_LEVEL(level_generic)
#if defined(__x86_64__)
MERIT_DECLARE_LEVEL(level_avx2)
MERIT_DECLARE_LEVEL(level_avx512)
#endif

struct Level {
  const char* name;
  decltype(&level_generic::sketch_rows) sketch_rows;
  decltype(&level_generic::sketch_linear) sketch_linear;
  decltype(&level_generic::weighted_average) weighted_average;
  decltype(&level_generic::delta_gram) delta_gram;
};
