// Kernels of every family, in the order that they need. A level_*.cpp includes this inside its
// namespace, with the level's instruction set switched on.
#include "common/numbers.inl"
#include "common/splitmix64.inl"
#include "average/average.inl"
#include "cross_entropy/logits.inl"
#include "cross_entropy/cross_entropy.inl"
#include "layers/layers.inl"
#include "optimizer/optimizer.inl"
#include "search/search.inl"
#include "sketch/sketch.inl"
