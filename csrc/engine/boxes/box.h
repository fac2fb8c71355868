// Boxes of a tensor: nested loops over the elements of a source and of a target.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

// One loop over a box. Strides in elements.
struct Loop {
  int64_t count, target_stride, source_stride;
};

const int kMostLoops = 8;

// Element i of a box: source[source_start + sum_d i_d source_stride_d] goes to
// target[target_start + sum_d i_d target_stride_d].
struct Box {
  int64_t source;  // index in the list of sources
  int64_t target_start, source_start;
  int num_loops;
  Loop loops[kMostLoops];  // outermost first in the order of the target

  int64_t target_end() const;  // one past the last element
  void drop_outer_loop(int64_t index);
};

// The inner loops of a box in the order of its source whose runs are read together, as only small
// gaps lie between them.
struct Block {
  int first_loop;  // the number of loops: every element is read by itself
  int64_t step;    // indices of the first loop that one read covers
  int64_t span;    // elements that one read covers
};

// The fields of Part in merge/read/entries.py: [P, 2 + 4 D] source, start, and D each of offsets,
// sizes, strides and steps.
struct BoxTable {
  const int64_t* values;
  int64_t parts;
  std::vector<int64_t> shape;  // [D], of the target
};

inline bool is_run(const Loop& loop) { return loop.target_stride == 1 && loop.source_stride == 1; }

// Reads one row of a table. Returns the number of its elements; throws std::invalid_argument if the
// box lies outside of its tensor.
int64_t fill_box(const BoxTable& table, int64_t part, Box* box);

// gap: elements that are read along rather than skipped. most: elements of one read.
Block find_block(const Box& box, int64_t gap, int64_t most);

// Brings elements of `item` bytes to their places by the loops.
void scatter_items(size_t item, const char* from, char* to, const Loop* loops, int num_loops);
