// What linear + cross-entropy needs besides matrix products.
#pragma once
#include <cstdint>

// The logits of `rows` tokens for the words first, first + 1, ... of the vocabulary. Words are float or bf16.
struct LogitsTile {
  const void* logits;  // [rows, columns]
  bool bf16;
  int64_t rows, columns, first;
  const float* bias;      // [columns], added to the logits; or null
  float softcap;          // c of c * tanh(logits / c), taken after the bias; 0: none
  const int64_t* labels;  // [rows], in the whole vocabulary
  int threads;
};

// Per token, over the tiles so far: the maximum, the sum of e^(logit - maximum), the label's logit, the sum of logits.
struct LossUpdate : LogitsTile {
  double* state;  // [4, rows], `stride` apart
  int64_t stride;
};

// d loss / d logits = (factor * e^(logit - shift) - uniform - target at the label) * the softcap's slope.
struct LossGradient : LogitsTile {
  const float* terms;  // [4, rows], `stride` apart: shift, factor, target, uniform
  int64_t stride;
  void* out;  // [rows, columns] of the logits' type; may be the logits
};

struct LossKernels {
  void (*update)(const LossUpdate& job);
  void (*gradient)(const LossGradient& job);
};
