// Passes over one tensor in chunks of bounded memory: its inputs, and the sizes of their deltas
// from the last input.
#pragma once
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <vector>

#include "engine/ranks.h"
#include "engine/streaming.h"
#include "engine/workers.h"

// Elements of an input that a buffer holds.
struct Held {
  int64_t first, elements;
};

// Buffers of one worker.
struct Buffers {
  std::vector<const void*> inputs;  // of the chunk, here or among the kept ones
  std::vector<Held> held;           // in the buffers from `start` on
  char *start, *out, *scratch;      // scratch: for sources that are decoded
  float* sizes;
  uint32_t *ranks, *rank_space;
  std::vector<double> mix_space;
};

class TensorReader {
 public:
  // row: 0, or the elements of a row, of which every chunk but the last then holds a whole number.
  // Its workers have the pool's memory from number `first_worker` on.
  TensorReader(const Engine& engine, const Segment& tensor, int64_t row, Pool* pool,
               int first_worker);

  int branches() const { return branches_; }
  int64_t chunks() const { return chunks_; }
  int64_t chunk_elements() const { return step_; }
  int64_t length(int64_t chunk) const;
  const std::vector<DType>& types() const { return types_; }
  bool failed() const { return result_.segment >= 0; }
  const MergeResult& result() const { return result_; }

  // Records the first error and returns false.
  bool fail(int error, int64_t chunk, int64_t input, bool nonfinite);

  // Calls body(buffers, worker, chunk) for every chunk; returns false after an error.
  template <class Body>
  bool for_each_chunk(const Body& body) {
    for_each_item(chunks_, engine_.threads, [&](int worker, int64_t chunk) {
      Buffers* b = buffers(worker);
      return b ? body(b, worker, chunk) : fail(ENOMEM, chunk, -1, false);
    });
    return !failed();
  }

  // Holds the first chunks of all inputs from one pass to the next, in memory of so many bytes.
  void keep_chunks(char* memory, size_t bytes);

  bool read_all_inputs(Buffers* b, int64_t chunk);

  // Writes the sizes of one ranking of n elements in the buffers, from `first` on, to b->sizes.
  void delta_sizes(Buffers* b, int ranking, int64_t first, int64_t n) const;

  // Calls `use` with the sizes of every wanted ranking of every chunk, block by block in order;
  // returns false after an error.
  bool scan(const std::vector<int>& wanted, const UseSizes& use);

  // Collects sizes of runs of elements spread evenly over the tensor; of all elements if it is
  // small.
  bool sample(const std::vector<int>& wanted, std::vector<float>* samples);

 private:
  Buffers* buffers(int worker);
  bool read(Buffers* b, const std::vector<size_t>& inputs, int64_t first, int64_t n);
  bool read_chunk(Buffers* b, const std::vector<size_t>& inputs, int64_t chunk);
  size_t input_stride() const;
  std::vector<size_t> needed(const std::vector<int>& rankings) const;

  const Engine& engine_;
  const Segment& tensor_;
  const int branches_;
  const int64_t row_;
  int64_t step_, chunks_;
  Pool* const pool_;
  const int first_worker_;
  std::vector<Buffers> workers_;
  char* kept_ = nullptr;       // [chunks, inputs] of input_stride() bytes
  std::vector<char> is_kept_;  // of each of the first chunks
  std::vector<DType> types_;
  std::mutex mutex_;
  MergeResult result_{0, -1, 0, -1, false};
};
