// A tensor whose elements lie in boxes of other sources: stacked, fused, split, transposed and
// interleaved tensors, chunks of distributed checkpoints, rows of a vocabulary.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/read/source.h"
#include "engine/read/wide_runs.h"

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

class BoxesSource : public Source {
 public:
  // type: of all sources, or F64. wide: elements that are read together where single ones would
  // take a call each, or 0. Throws std::invalid_argument if elements are left out, or a source is
  // of another type.
  BoxesSource(std::vector<SourcePtr> sources, const BoxTable& table, DType type, int64_t wide);

  DType type() const override { return type_; }
  size_t scratch_bytes(int64_t n) const override;
  int64_t worthwhile_gap() const override { return gap_; }
  int read(const Reading& reading, int64_t first, int64_t n, char* out,
           char* scratch) const override;

 private:
  struct Stored {
    int64_t source, target_start, source_start, target_end;
    uint32_t first_loop, num_loops;
  };
  struct Window;  // the run of elements that a call reads

  void store(const Box& box);
  bool is_turned(const Box& box) const;
  int read_wide(const Reading& reading, int64_t first, int64_t n, char* out, char* scratch) const;
  int fill(const Reading& reading, Wide* run, int64_t most, char* scratch) const;
  int64_t find_latest(size_t low, size_t high);
  int read_boxes(const Window& window, size_t low, size_t high) const;
  int read_inside(const Window& window, Box box) const;
  int read_box(const Window& window, Box box) const;
  int read_blocks(const Window& window, Box* box, const Block& block, int loop) const;
  int read_block(const Window& window, const Box& box, int first_loop, int64_t span) const;

  std::vector<SourcePtr> sources_;
  std::vector<Stored> boxes_;    // by target_start
  std::vector<Loop> loops_;      // of all boxes
  std::vector<int64_t> latest_;  // [middle of a range of boxes]: where the last of them ends
  DType type_;
  int64_t gap_ = 0;
  int64_t elements_ = 1;
  int64_t wide_ = 0;  // 0: every chunk is read by itself
};
