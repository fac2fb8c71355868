// AdamW in one pass over each parameter.
#pragma once
#include <cstdint>

struct OptimizerKernels {};
