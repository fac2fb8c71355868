// Exact order statistics of the sizes of a tensor's deltas, from passes over files in bounded
// memory.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "average/average.h"

// The `rank` largest sizes of one ranking: those above `value`, and the first `ties` elements, by
// index, that equal it.
struct Threshold {
  int ranking;  // a branch, or kVariance
  int64_t rank;
  float value;
  int64_t ties;
  std::vector<int64_t>
      chunk_ties;  // elements of each chunk that equal `value`; all 0 if every one is wanted
};

// Receives the number of a worker and of a chunk, the index in the list of wanted rankings, and the
// sizes of a block of that chunk.
typedef std::function<void(int worker, int64_t chunk, size_t index, const float* sizes, int64_t n)>
    UseSizes;

// The sizes of a tensor's deltas, by any ranking.
struct Sizes {
  int64_t elements, chunks, chunk_elements;
  int threads;
  // Differences of 16-bit floats: the guess from a sample is often the value itself.
  bool few_values;
  const AverageKernels& kernels;
  // Passes over all sizes; returns false after an error.
  std::function<bool(const std::vector<int>& wanted, const UseSizes& use)> scan;
  // Fills one list of samples per ranking; returns false after an error.
  std::function<bool(const std::vector<int>& wanted, std::vector<float>* samples)> sample;
};

// Fills value, ties and chunk_ties of every threshold from its rank. Returns false after an error.
bool find_thresholds(const Sizes& sizes, std::vector<Threshold>* thresholds);

// ranks[i] = number of the n sizes that come before element i in rising order, ties by index.
// space: 4 n words.
void rank_row(const float* sizes, int64_t n, uint32_t* ranks, uint32_t* space);
