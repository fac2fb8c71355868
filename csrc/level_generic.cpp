#include <omp.h>

#include "levels.h"
#define MERIT_GENERIC 1
namespace level_generic {
#include "numbers.inl"
#include "average.inl"
#include "deltas.inl"
#include "sketch.inl"
#include "sketch_linear.inl"
#include "token_sums.inl"
#include "cross_entropy.inl"
#include "optimizer.inl"
#include "layers.inl"
}
