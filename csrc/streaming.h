// N-way weighted average from files to files with bounded memory: workers take chunks from a counter, pread the
// inputs into their own buffers, average, pwrite to the final offset. Memory: threads x (N + 1) x chunk bytes.
#pragma once
#include <cstdint>
#include <vector>

#include "levels.h"

// A run of elements that is contiguous in every input and in the output.
struct Segment {
  int64_t elements;
  int output_fd;
  int64_t output_offset;  // bytes
  DType output_type;
  std::vector<int> input_fds;
  std::vector<int64_t> input_offsets;  // bytes
  std::vector<DType> input_types;
  std::vector<double> weights;  // of the first inputs; none: nothing is averaged or written
};

struct MergeResult {
  int error;          // an errno, 0 for none
  int64_t segment;    // where it happened, -1 for nowhere
  int64_t element;    // first element of the chunk in that segment
  int64_t input;      // which input could not be read; -1: the output
  bool nonfinite;     // a value is not finite in the output type
};

// A run of elements of one tensor inside one chunk, whose deltas' Gram matrix is wanted.
struct Piece {
  int64_t segment, first, elements;
};

// Gram matrices to take: pieces (sorted, none across a chunk's border) of the first `branches` inputs, as deltas from
// the input after them or from zero. gram gets [pieces, branches, branches].
struct GramJob {
  std::vector<Piece> pieces;
  int branches;
  bool from_base;
  double* gram;
};

MergeResult merge_files(const Level& level, const std::vector<Segment>& segments, int64_t chunk_elements, int threads,
                        bool allow_nonfinite, const GramJob& grams, int64_t* elements_done);
