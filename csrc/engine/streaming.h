// Merges from files to files in bounded memory. Workers take chunks from a counter, read the inputs
// into their own buffers, combine them and write to the final offset. Memory: threads x (N + 1) x
// chunk bytes.
#pragma once
#include <cstdint>
#include <vector>

#include "average/average.h"
#include "engine/read/source.h"
#include "engine/boxes/wide_runs.h"
#include "engine/write/written.h"

// A run of elements that is contiguous in every input and in the output.
struct Segment {
  int64_t elements;
  int output_fd;          // -1: the output is memory
  int64_t output_offset;  // bytes, or an address
  DType output_type;
  std::vector<SourcePtr> inputs;
  std::vector<double> weights;  // of the first inputs; empty: nothing is averaged or written
};

struct MergeResult {
  int error;        // an errno, 0 for none
  int64_t segment;  // index of the segment at fault, -1 for none
  int64_t element;  // first element of the chunk in that segment
  int64_t input;    // index of the input that could not be read; -1: the output
  bool nonfinite;   // a value is not finite in the output type
};

// A run of elements of one tensor inside one chunk, of whose deltas the Gram matrix is wanted.
struct Piece {
  int64_t segment, first, elements;
};

// Gram matrices to compute: pieces (sorted, none across the border of a chunk) of the first
// `branches` inputs, as deltas from the input after them, or without `from_base` from zero.
struct GramJob {
  std::vector<Piece> pieces;
  int branches;
  bool from_base;
  double* gram;  // [pieces, branches, branches]
};

// Shared by all workers of a merge.
struct Engine {
  const AverageKernels& kernels;
  const RemoteRead& remote;
  int64_t chunk_elements;
  int threads;
  bool allow_nonfinite;
  bool write_early;        // the output will be fsynced
  int64_t kept_bytes;      // of a tensor's chunks, held from one pass to the next
  int64_t* elements_done;  // grows while the merge runs
  Written* written;        // gets the bytes of the output file; null: nobody follows
  WideRuns* wide_runs;
};

// Writes n bytes of a segment at `at`, an offset of its file or an address; returns 0 or an errno.
int write_output(const Engine& engine, const Segment& segment, const char* p, int64_t n,
                 int64_t at);

const size_t kWidePerInput = 2;  // wide runs that are kept

// Writes the weighted sum of each segment's inputs.
MergeResult merge_sums(const Engine& engine, const std::vector<Segment>& segments,
                       const GramJob& grams);

// How the deltas of one tensor from its last input are thinned and mixed: MixRule with arrays of
// its own, and ranks in place of thresholds. Branch k keeps its elements of rank top[k] .. top[k] +
// keep[k] by falling size, ties by index.
struct TensorRule {
  std::vector<double> weight;
  std::vector<int64_t> top, keep;  // or empty
  // Below 1: one mask for all branches keeps this share of the nonzero variances, the largest.
  double variance_share;
  std::vector<uint64_t> stream;  // or empty
  std::vector<double> density, epsilon;
  bool divide;  // by the keep probability
  // Multiplies every branch's kept deltas so that their sizes sum to those of all its deltas.
  bool restore_sizes;
  int64_t row;
  bool elect, normalize, weigh_by_squares;
  double scale;
};

// Merges tensors by one rule each: passes over a tensor's inputs until every threshold is exact,
// then writes in a last pass. Ignores the tensors' weights.
MergeResult merge_deltas(const Engine& engine, const std::vector<Segment>& tensors,
                         const std::vector<TensorRule>& rules, const GramJob& grams);
