// ISA levels: one table of kernels per family and level, and the choice of a level when the module
// loads. All levels give the same bits, because contraction is off; only the sums of
// SketchKernels::linear and of the bf16 head depend on the level.
#pragma once
#include "average/average.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/head.h"
#include "layers/layers.h"
#include "optimizer/optimizer.h"
#include "search/search.h"
#include "sketch/sketch.h"

struct Level {
  const char* name;
  const AverageKernels& average;
  const SketchKernels& sketch;
  const LossKernels& loss;
  const HeadKernels* head;  // null where the level has none
  const OptimizerKernels& optimizer;
  const LayerKernels& layers;
  const SearchKernels& search;
};

// Returns the best level of this CPU, or the one that MERIT_FAST_SIMD names.
// Throws std::invalid_argument if this CPU does not support that one.
const Level& choose_level();
