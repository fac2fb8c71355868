// Table of the sketch's kernels at one level.
#include "sketch/tiles.inl"
#include "sketch/rows.inl"
#include "sketch/operands.inl"
#include "sketch/blocks.inl"
#include "sketch/linear.inl"
#include "sketch/token_sums.inl"

extern const SketchKernels sketch_kernels = {
    .rows = sketch_rows,
    .linear = sketch_linear,
    .token_sums = token_sums,
};
