// Both passes of a bf16 head over its vocabulary, with products of pairs of bf16 (vdpbf16ps). Rows
// are tokens, padded with zeros to a multiple of 16; the width is one, too.
#pragma once
#include <cstdint>

struct HeadPass {
  const uint16_t* hidden;  // [width / 2, rows, 2]: pairs of neighbouring columns
  const uint16_t* weight;  // [words, width]
  int64_t rows, tokens, width, words;
  int64_t first;          // word of the vocabulary to which the first row of `weight` belongs
  const float* bias;      // [words], or null
  float scale;            // as in LogitsTile
  float softcap;          // as in LogitsTile
  float sharpness;        // as in LogitsTile
  const int64_t* labels;  // [tokens], in the whole vocabulary
  uint16_t* kept;         // [kept_words, rows]: products of the first words
  int64_t kept_words;
  int threads;
};

// The state of each token, as in LossUpdate.
struct HeadForward : HeadPass {
  double* state;   // [4, tokens], or [6, tokens] with statistics
  int64_t stride;  // elements from one row of the state to the next
  bool statistics;
};

// The gradients of a function of the logits, whose terms are those of LossGradient.
struct HeadBackward : HeadPass {
  const uint16_t* token_pairs;  // [rows / 2, width, 2]: hidden in pairs of neighbouring tokens
  const float* terms;           // [5, rows]: shift, factor, target, uniform, linear
  float* d_hidden;              // [rows, width], added to; or null
  uint16_t* d_weight;           // [words, width], or null
  float* d_bias;                // [words], or null
};

struct HeadKernels {
  void (*forward)(const HeadForward& job);
  void (*backward)(const HeadBackward& job);
};
