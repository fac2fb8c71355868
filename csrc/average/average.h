// Weighted averages, Gram matrices of deltas, and merges of thinned deltas, all in fp64.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtypes.h"

const int64_t kAverageBlock = 2048;    // two fp64 blocks of it stay in L1
const int64_t kMixBlock = 512;         // K fp64 blocks of it stay in L2
const uint32_t kNoSize = 0x7fffffffu;  // bits above every size that occurs: none is kept
const int kVariance = -1;              // in place of a branch: rank by the variance of the deltas

// Doubles that AverageKernels::delta_gram works in.
inline size_t gram_scratch(int branches) {
  return size_t(branches + 1) * kAverageBlock + size_t(branches) * size_t(branches) * 8;
}

// How the deltas of one tensor are thinned and mixed. Arrays have one entry per branch; a step
// whose array is null is skipped.
struct MixRule {
  int branches;
  const double* weight;
  const float *low, *high;  // keeps sizes from `low` up, but drops those from `high` up
  bool by_variance;         // one mask for all branches, ranked by the variance of their deltas
  const uint64_t* stream;   // of random numbers: keeps with probability density, then divides by it
  const double *density, *epsilon;
  bool divide;            // by the probability
  const double* enlarge;  // factor on every delta, or null
  int64_t row;            // elements of a row; probabilities rise along its ranks by 2 epsilon
  bool elect,
      normalize;     // sums only deltas of the elected sign; divides by the sum of their weights
  bool plain_votes;  // elects by deltas without their weights
  double scale;
};

// An input is an address and a type, so that the types of one call may differ. Functions of deltas
// take the branches and after them the base.
struct AverageKernels {
  // out[i] = sum_k weights_k inputs_k[i], in the order of k, rounded once. Returns whether every
  // result is finite.
  bool (*weighted_average)(const void* const* inputs, const DType* types, const double* weights,
                           int count, void* out, DType out_type, int64_t n);
  // gram[i, j] = <x_i - base, x_j - base> over elements first .. first + n; without `from_base` the
  // base is zero. gram is [branches, branches]; only its upper triangle is written. scratch:
  // gram_scratch(branches).
  void (*delta_gram)(const void* const* inputs, const DType* types, int branches, bool from_base,
                     int64_t first, int64_t n, double* gram, double* scratch);
  // Writes the fp32 sizes by which elements are ranked: |x_k - base|, or with k = kVariance the
  // population variance of the deltas.
  void (*delta_sizes)(const void* const* inputs, const DType* types, int branches, int k,
                      int64_t at, int64_t n, float* sizes);
  // Counts the sizes above a value and those that equal it. Sizes compare by their bits, so NaN
  // ranks above infinity.
  void (*count_sizes)(const float* sizes, int64_t n, float value, int64_t* above, int64_t* equal);
  // Writes the bits of the sizes in [low, high), in order, to `picked`, which has room for n + 16.
  // Returns their number; `above` counts the sizes from `high` up.
  int64_t (*pick_sizes)(const float* sizes, int64_t n, uint32_t low, uint32_t high,
                        uint32_t* picked, int64_t* above);
  // out = base + scale * mix_k(weight_k * sparse_k(x_k - base)), rounded once. `element` is the
  // place in the tensor of the first element; the tie counts are those of this chunk and are
  // counted down. Returns whether every input and result is finite.
  bool (*mix_deltas)(const MixRule& rule, const void* const* inputs, const DType* types,
                     int64_t element, int64_t n, int64_t* low_ties, int64_t* high_ties,
                     const uint32_t* ranks, void* out, DType out_type, double* scratch);
  // squares[k] = sum of the squares of the kept deltas of branch k. lanes: [branches, 8] to work
  // in.
  void (*kept_squares)(const MixRule& rule, const void* const* inputs, const DType* types,
                       int64_t n, int64_t* low_ties, int64_t* high_ties, double* squares,
                       double* lanes);
  // out[i] = base[i] + factor * sum_r left[row, r] * right[r, col] for elements first .. first + n
  // of a [rows, cols] matrix, r in order.
  void (*low_rank_rows)(const double* base, const float* left, const float* right, int64_t rank,
                        int64_t cols, double factor, int64_t first, int64_t n, double* out);
  // sums[k] = sum of the sizes of all deltas of branch k, sums[branches + k] = that of the kept
  // ones. lanes: [2 branches, 8] to work in.
  void (*kept_sizes)(const MixRule& rule, const void* const* inputs, const DType* types, int64_t n,
                     int64_t* low_ties, int64_t* high_ties, double* sums, double* lanes);
  // out = base + clip(t / max(|d|, 1e-6), 0, 1) d of one model. Returns whether every input and
  // result is finite, as the other kernels of elements do.
  bool (*mix_near)(const void* const* inputs, const DType* types, double t, int64_t n, void* out,
                   DType out_type);
  // Counts the elements of every model whose delta is larger than epsilon, where other models'
  // deltas are too (shared) and where no other is (unique). models: [count, kMixBlock] to work in.
  void (*tally_active)(const void* const* inputs, const DType* types, int count, double epsilon,
                       int64_t n, int64_t* shared, int64_t* unique, double* models);
  // out = base + the mean of the deltas larger than epsilon, or factor_k times the only one.
  bool (*mix_active)(const void* const* inputs, const DType* types, int count, double epsilon,
                     const double* factor, int64_t n, void* out, DType out_type, double* models);
  // importance[i] = |d_i| KL(softmax of a row of the model || softmax of the base's), 1e-8 added to
  // both. scratch: 4 n doubles.
  bool (*row_importance)(const void* const* inputs, const DType* types, int64_t at, int64_t n,
                         float* importance, double* scratch);
  // out = the model where the importance reaches the threshold, else the base.
  bool (*mix_important)(const void* const* inputs, const DType* types, const float* importance,
                        double threshold, int64_t n, void* out, DType out_type);
  // gram[a, b, i] += d_a[i] d_b[i] for a <= b; gram is [branches, branches, n], deltas
  // [branches, kMixBlock] to work in.
  void (*add_products)(const void* const* inputs, const DType* types, int branches, bool from_base,
                       int64_t n, double* gram, double* deltas);
  // out[i] = sum_k weights[k, i] inputs_k[i], in the order of k, rounded once.
  bool (*weighted_columns)(const void* const* inputs, const DType* types, const double* weights,
                           int count, int64_t n, void* out, DType out_type);
};
