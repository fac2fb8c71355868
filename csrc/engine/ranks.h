// Exact order statistics of a tensor's delta sizes, from passes over files in bounded memory.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "levels/levels.h"

// The `rank` largest sizes of one ranking: those above `value` and the first `ties` elements, by index, that equal it.
struct Threshold {
  int which;  // a branch, or kVariance
  int64_t rank;
  float value;
  int64_t ties;
  std::vector<int64_t> chunk_ties;  // how many of them each chunk holds; all 0 where all are wanted
};

// Called with a worker's number, a chunk's, the place of a ranking in the list of wanted ones, and its sizes.
typedef std::function<void(int worker, int64_t chunk, size_t place, const float* sizes, int64_t n)>
    UseSizes;

// A tensor's sizes, by whatever ranking is wanted.
struct Sizes {
  int64_t elements, chunks, chunk_elements;
  int threads;
  bool few_values;  // differences of 16-bit floats: the sample's guess is often the value itself
  const Level& level;
  std::function<bool(const std::vector<int>& wanted, const UseSizes& use)>
      scan;  // all; false after an error
  std::function<bool(const std::vector<int>& wanted, std::vector<float>* samples)>
      sample;  // one list per ranking
};

// Fills value, ties and chunk_ties of every threshold from its rank. Returns false after an error.
bool find_thresholds(const Sizes& sizes, std::vector<Threshold>* thresholds);

// ranks[i] = how many of the n sizes come before element i in rising order, ties by index. space: 4 n words.
void rank_row(const float* sizes, int64_t n, uint32_t* ranks, uint32_t* space);
