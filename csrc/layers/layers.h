// Norms, gated activations and rotary positions.
#pragma once
#include <cstdint>

// A matrix of floats or bf16 bits, by rows: entry (r, c) is element r * stride + c. A matrix
// without data is absent.
struct LayerMatrix {
  void* data;
  bool bf16;
  int64_t stride;
};

// RMSNorm of each row of x, or of total = x + residual, which is written too.
struct NormJob {
  int64_t rows, cols;
  LayerMatrix x, residual, total;  // total is float if x or residual is
  LayerMatrix out;                 // float if the normed matrix or scale is
  const float* scale;              // [cols]
  float epsilon;
  bool round_first;  // rounds the normed row to its own type before it is scaled
  int threads;
};

// Rows whose gradients of the scale are summed in float; such sums are then added in double.
const int64_t kNormRows = 16;

struct NormBackward {
  int64_t rows, cols;
  LayerMatrix dout, x;
  LayerMatrix dtotal, dx;  // of the type of x; dtotal is added to the gradient of x
  const float* scale;
  float epsilon;
  float* sums;    // [ceil(rows / kNormRows), cols] to work in, or null: no gradient of the scale
  float* dscale;  // [cols]
  int threads;
};

enum class Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2 };

// out = activation(gate) * up; with dout, the gradients dgate and dup instead. All matrices have
// one type.
struct GatedJob {
  int64_t rows, cols;
  LayerMatrix gate, up, out, dout, dgate, dup;
  Activation activation;
  int threads;
};

// [B, heads, T, width], the last dimension dense; strides in elements.
struct RopeHeads {
  void* data;
  bool bf16;
  int64_t heads, batch_stride, head_stride, token_stride;
};

// Rotates each of the first `rotary` entries of a head with its partner, rotary / 2 away or its
// neighbour; copies the other entries.
struct RopeJob {
  int64_t batch, tokens, width, rotary;
  RopeHeads in[2];     // queries and keys
  RopeHeads out[2];    // float if in or cos is; in the backward job, if in is
  RopeHeads cos, sin;  // [B or 1, T, rotary], of one type; one head
  bool interleaved;    // partners are neighbours
  bool backward;       // rotates the other way
  int threads;
};

struct LayerKernels {
  void (*norm)(const NormJob&);
  void (*norm_backward)(const NormBackward&);
  void (*gated)(const GatedJob&);
  void (*rope)(const RopeJob&);
};
