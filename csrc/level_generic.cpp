#include <omp.h>

#include "levels.h"
#define MERIT_GENERIC 1
namespace level_generic {
#include "average.inl"
#include "deltas.inl"
#include "sketch.inl"
#include "sketch_linear.inl"
#include "token_sums.inl"
}
