// The steps of linear + cross-entropy between the matrix products.
#pragma once
#include <cstdint>

// Logits of `rows` tokens for `columns` words of the vocabulary, from word `first` on.
struct LogitsTile {
  const void* logits;  // [rows, columns], float or bf16
  bool bf16;
  int64_t rows, columns, first;
  const float* bias;      // [columns], added to the logits; or null
  float scale;            // factor after the bias
  float softcap;          // c of c * tanh(logits / c), applied after the scale; 0: none
  float sharpness;        // last factor: 1 / temperature
  const int64_t* labels;  // [rows], in the whole vocabulary
  int threads;
};

// State of each token over the tiles so far: maximum, sum of e^(logit - maximum), logit of the
// label, sum of logits; with statistics also sum of (logit - maximum) e^(logit - maximum) and the
// maximum over the words before the label.
struct LossUpdate : LogitsTile {
  double* state;   // [4, rows], or [6, rows] with statistics
  int64_t stride;  // elements from one row of the state to the next
  bool statistics;
};

// d loss / d logits = ((factor + linear * (logit - shift)) * e^(logit - shift) - uniform - target
// at the label) * the slope of scale, softcap and sharpness.
struct LossGradient : LogitsTile {
  const float* terms;  // [4, rows]: shift, factor, target, uniform; or [5, rows]: and linear
  bool linear;
  int64_t stride;  // elements from one row of the terms to the next
  void* out;       // [rows, columns] of the logits' type; may be the logits
};

struct LossKernels {
  void (*update)(const LossUpdate& job);
  void (*gradient)(const LossGradient& job);
};
