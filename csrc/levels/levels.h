// What every ISA level provides. The bodies are in the .inl files, compiled once per level (level_generic.cpp,
// level_avx2.cpp, level_avx512.cpp) with contraction off, so all levels give the same bits (but for sketch_linear).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cross_entropy/cross_entropy.h"
#include "layers/layers.h"
#include "optimizer/optimizer.h"

// Codes shared with kernels/average/__init__.py.
enum class DType : int32_t { BF16 = 0, F16 = 1, F32 = 2, F64 = 3 };

inline size_t item_bytes(DType t) { return t == DType::F64 ? 8 : t == DType::F32 ? 4 : 2; }

const int64_t kAverageBlock = 2048;    // two fp64 blocks of it stay in L1
const int64_t kMixBlock = 512;         // K fp64 blocks of it stay in L2
const uint32_t kNoSize = 0x7fffffffu;  // bits above every size that occurs: none is kept
const int kVariance = -1;              // instead of a branch: rank elements by the deltas' variance

// Doubles that delta_gram needs to work in.
inline size_t gram_scratch(int branches) {
  return size_t(branches + 1) * kAverageBlock + size_t(branches) * size_t(branches) * 8;
}

// How the deltas of one tensor are thinned and mixed. Arrays have one entry per branch; a null array: no such step.
struct MixRule {
  int branches;
  const double* weight;
  const float *low, *high;  // keep sizes from `low` up, but not those from `high` up
  bool by_variance;         // one mask for all, ranked by the deltas' variance
  const uint64_t* stream;   // of random numbers: keep with probability density, and divide by it
  const double *density, *epsilon;
  int64_t row;            // elements of a row; probabilities rise along its ranks by 2 epsilon
  bool elect, normalize;  // only deltas of the elected sign; divided by their weights
  bool plain_votes;       // the election is by deltas without their weights
  double scale;
};

// Rows of examples laid end to end: those of example b are offsets[b]..offsets[b + 1] - 1.
struct SketchMatrix {
  const void* data;  // [rows, cols], float or bf16 bits
  bool bf16;
  int64_t cols, row_stride;  // elements
};

// Where a sketch goes: the part from (first_row, first_col) on of a parameter with all_cols columns.
struct SketchTarget {
  const int64_t* offsets;  // [examples + 1]
  int64_t examples;
  int64_t first_row, first_col, all_cols;
  uint64_t key;          // of (hash version, seed, parameter name)
  int64_t proj_dim;      // multiple of 64 * 64
  const float* scale;    // [rows, cols] of this part, times which a gradient is hashed; or null
  int64_t scale_stride;  // elements
  float* out;            // [examples, proj_dim], added to
  int parts,
      threads;  // parts <= proj_dim / (64 * 64); each owns the buckets r with r % parts == part
};

// Gradients that exist: row n is row row_ids[n] of the parameter, or first_row + its place in the example.
struct SketchRows : SketchTarget {
  SketchMatrix x;
  const int64_t* row_ids;  // or null
};

const int64_t kLinearScratch =
    80 * 1024;  // words of 32 bits per thread; with a sketch of 65536 floats, half of L2

// dY^T X of each example; rows of the matrices are tokens.
struct LinearSketch : SketchTarget {
  SketchMatrix dy, x;
  uint32_t* scratch;  // [threads, kLinearScratch], on 64 bytes
};

// out[b, c] += the sum over example b's tokens of dy[., c] * x[., c], each row of x over its root mean square if wanted.
struct TokenSums {
  SketchMatrix dy, x;      // x without data: of dy alone
  const int64_t* offsets;  // [examples + 1]
  int64_t examples;
  bool normalize;
  float epsilon;  // under the root
  float* out;     // [examples, dy.cols]
  int threads;
};

#define MERIT_DECLARE_LEVEL(ns)                                                                    \
  namespace ns {                                                                                   \
  extern const LossKernels loss_kernels;                                                           \
  extern const OptimizerKernels optimizer_kernels;                                                 \
  extern const LayerKernels layer_kernels;                                                         \
  void sketch_rows(const SketchRows& job);                                                         \
  void sketch_linear(const LinearSketch& job);                                                     \
  void token_sums(const TokenSums& job);                                                           \
  bool weighted_average(const void* const* inputs, const DType* types, const double* weights,      \
                        int count, void* out, DType out_type, int64_t n);                          \
  void delta_gram(const void* const* inputs, const DType* types, int branches, bool from_base,     \
                  int64_t first, int64_t n, double* gram, double* scratch);                        \
  void delta_sizes(const void* const* inputs, const DType* types, int branches, int k, int64_t at, \
                   int64_t n, float* sizes);                                                       \
  void count_sizes(const float* sizes, int64_t n, float value, int64_t* above, int64_t* equal);    \
  int64_t pick_sizes(const float* sizes, int64_t n, uint32_t low, uint32_t high, uint32_t* picked, \
                     int64_t* above);                                                              \
  bool mix_deltas(const MixRule& rule, const void* const* inputs, const DType* types,              \
                  int64_t element, int64_t n, int64_t* low_ties, int64_t* high_ties,               \
                  const uint32_t* ranks, void* out, DType out_type, double* scratch);              \
  void kept_squares(const MixRule& rule, const void* const* inputs, const DType* types, int64_t n, \
                    int64_t* low_ties, int64_t* high_ties, double* squares, double* lanes);        \
  void low_rank_rows(const double* base, const float* left, const float* right, int64_t rank,      \
                     int64_t cols, double factor, int64_t first, int64_t n, double* out);          \
  }
MERIT_DECLARE_LEVEL(level_generic)
#if defined(__x86_64__)
MERIT_DECLARE_LEVEL(level_avx2)
MERIT_DECLARE_LEVEL(level_avx512)
namespace level_avx512_bf16 {  // avx512 in all but this
void sketch_linear(const LinearSketch& job);
}
#endif

struct Level {
  const char* name;
  const LossKernels* loss;
  const OptimizerKernels* optimizer;
  const LayerKernels* layers;
  decltype(&level_generic::sketch_rows) sketch_rows;
  decltype(&level_generic::sketch_linear) sketch_linear;
  decltype(&level_generic::token_sums) token_sums;
  decltype(&level_generic::weighted_average) weighted_average;
  decltype(&level_generic::delta_gram) delta_gram;
  decltype(&level_generic::delta_sizes) delta_sizes;
  decltype(&level_generic::count_sizes) count_sizes;
  decltype(&level_generic::pick_sizes) pick_sizes;
  decltype(&level_generic::mix_deltas) mix_deltas;
  decltype(&level_generic::kept_squares) kept_squares;
  decltype(&level_generic::low_rank_rows) low_rank_rows;
};
