// A tensor whose elements lie in boxes of other sources: stacked, fused, split, transposed and
// interleaved tensors, chunks of distributed checkpoints, rows of a vocabulary.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/boxes/box.h"
#include "engine/read/source.h"
#include "engine/boxes/wide_runs.h"

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
