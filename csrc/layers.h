// Norms, gated activations and rotary positions.
#pragma once
#include <cstdint>

struct LayerKernels {};
