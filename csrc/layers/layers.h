// Norms, gated activations and rotary positions.
#pragma once
#include <cstdint>

// A matrix of floats or bf16 bits, by rows: entry (r, c) is element r * stride + c. Without data: not there.
struct LayerMatrix {
  void* data;
  bool bf16;
  int64_t stride;
};

// RMSNorm of each row of x, or of total = x + residual, which is written too.
struct NormJob {
  int64_t rows, cols;
  LayerMatrix x, residual, total,
      out;  // total is float where x or residual is; out where what is normed or scale is
  const float* scale;  // [cols]
  float epsilon;
  bool round_first;  // the normed row is rounded to its own type before it is scaled
  int threads;
};

const int64_t kNormRows =
    16;  // whose gradients of the scale are summed in float, then added to others in double

struct NormBackward {
  int64_t rows, cols;
  LayerMatrix dout, x, dtotal,
      dx;  // dtotal is added to the gradient of x, and has the type of x as dx has
  const float* scale;
  float epsilon;
  float* sums;    // [ceil(rows / kNormRows), cols] to work in, or null: no gradient of the scale
  float* dscale;  // [cols]
  int threads;
};

enum class Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2 };

// out = activation(gate) * up; with dout the gradients instead. All of one type.
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

// Each of the first `rotary` entries of a head with its partner half of them away; the others are copied.
struct RopeJob {
  int64_t batch, tokens, width, rotary;
  RopeHeads in[2],
      out[2];  // of queries and of keys; out is float where in or cos is, and in the gradient's job in is
  RopeHeads cos, sin;  // [B or 1, T, rotary], of one type; no heads
  bool backward;       // turns the other way
  int threads;
};

struct LayerKernels {
  void (*norm)(const NormJob&);
  void (*norm_backward)(const NormBackward&);
  void (*gated)(const GatedJob&);
  void (*rope)(const RopeJob&);
};
