#include <omp.h>

#include "levels/levels.h"
#define MERIT_GENERIC 1
namespace level_generic {
#include "common/numbers.inl"
#include "average/average.inl"
#include "average/deltas.inl"
#include "sketch/sketch.inl"
#include "sketch/linear.inl"
#include "sketch/token_sums.inl"
#include "cross_entropy/cross_entropy.inl"
#include "optimizer/optimizer.inl"
#include "layers/layers.inl"
}  // namespace level_generic
