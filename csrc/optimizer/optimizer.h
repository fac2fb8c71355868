// AdamW in one pass over each parameter, and the norm of gradients.
#pragma once
#include <cstdint>

// Codes shared with MOMENTS and MASTERS of kernels/optimizer/_native.py.
enum class Moments : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };
// Split: 16, or 8, of the bits that bf16 lacks.
enum class Master : int32_t { NONE = 0, F32 = 1, SPLIT = 2, SPLIT8 = 3 };

const int64_t kUpdateItem = 16384;  // elements that one thread takes at a time
const int kUpdateChunk = 1024;      // elements of an item held in L1
const int kCodedChunk = 512;        // the same of blocks of 8-bit moments
const int kMomentBlock = 256;       // 8-bit moments that share a scale
const int kRandomBlock = 1024;      // elements whose random bits share a key

struct AdamWTensor {
  int64_t n;
  void *weight, *grad, *exp_avg, *exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;  // [ceil(n / 256)], of 8-bit moments
  void* master;                             // float, int16_t or int8_t [n]
  float* average;                           // [n] or null
  uint8_t* won;                             // set to 1 if a weight was not its master rounded
  uint64_t key;                             // of (seed, step, parameter)
  int64_t first;                            // index of the first element in the whole parameter
  float rate;                               // lr / (1 - beta1^t)
  float root;                               // 1 / sqrt(1 - beta2^t)
  float average_weight;                     // share of the new weight in the average
};

struct AdamWJob {
  const AdamWTensor* tensors;
  int64_t count;
  bool weight_bf16, grad_bf16;
  Moments moments;
  Master master;
  bool stochastic, zero_grad;
  float decay;                       // 1 - lr * weight_decay
  float beta1, rest1, beta2, rest2;  // rest: 1 - beta
  float epsilon, clip;
  int threads;
};

struct SquareSums {
  const void* const* data;  // float or bf16
  const int64_t* sizes;
  int64_t count;
  bool bf16;
  int threads;
  double* sums;  // one for every kUpdateItem elements of each tensor, in order
};

struct OptimizerKernels {
  void (*adamw)(const AdamWJob& job);
  void (*square_sums)(const SquareSums& job);
};

inline int64_t update_items(int64_t n) { return (n + kUpdateItem - 1) / kUpdateItem; }
