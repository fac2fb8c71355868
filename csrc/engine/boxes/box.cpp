#include "engine/boxes/box.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

// Adds a loop inside those that a box has; joins it to the last one where both step alike.
void add_loop(Box* box, const Loop& loop) {
  if (loop.count == 1) return;
  if (box->num_loops) {
    Loop& outer = box->loops[box->num_loops - 1];
    if (outer.target_stride == loop.count * loop.target_stride &&
        outer.source_stride == loop.count * loop.source_stride) {
      outer = {outer.count * loop.count, loop.target_stride, loop.source_stride};
      return;
    }
  }
  if (box->num_loops == kMostLoops)
    throw std::invalid_argument("BoxesSource: a box has too many dimensions");
  box->loops[box->num_loops++] = loop;
}

template <class T>
void scatter(const T* from, T* to, const Loop* loops, int num_loops) {
  const Loop loop = loops[0];
  if (num_loops > 1) {
    for (int64_t i = 0; i < loop.count; i++)
      scatter(from + i * loop.source_stride, to + i * loop.target_stride, loops + 1, num_loops - 1);
  } else if (is_run(loop)) {
    std::memcpy(to, from, size_t(loop.count) * sizeof(T));
  } else {
    for (int64_t i = 0; i < loop.count; i++)
      to[i * loop.target_stride] = from[i * loop.source_stride];
  }
}

}  // namespace

int64_t fill_box(const BoxTable& table, int64_t part, Box* box) {
  const int64_t dims = int64_t(table.shape.size());
  const int64_t* row = table.values + part * (2 + 4 * dims);
  const int64_t *offsets = row + 2, *sizes = offsets + dims, *strides = sizes + dims;
  const int64_t* steps = strides + dims;
  *box = {.source = row[0], .target_start = 0, .source_start = row[1], .num_loops = 0, .loops = {}};
  std::vector<int64_t> target_strides(static_cast<size_t>(dims));
  int64_t elements = 1;
  for (int64_t d = dims, stride = 1; d-- > 0; stride *= table.shape[size_t(d)])
    target_strides[size_t(d)] = stride;
  for (int64_t d = 0; d < dims; d++) {
    const int64_t stride = target_strides[size_t(d)];
    const int64_t last = offsets[d] + (sizes[d] - 1) * steps[d];
    if (sizes[d] < 0 || steps[d] < 1 || offsets[d] < 0 || last >= table.shape[size_t(d)])
      throw std::invalid_argument("BoxesSource: a box lies outside of its tensor");
    box->target_start += offsets[d] * stride;
    elements *= sizes[d];
    if (elements) add_loop(box, {sizes[d], steps[d] * stride, strides[d]});
  }
  if (!box->num_loops) box->loops[box->num_loops++] = {1, 1, 1};
  return elements;
}

void scatter_items(size_t item, const char* from, char* to, const Loop* loops, int num_loops) {
  if (item == 2)
    scatter(reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(to), loops,
            num_loops);
  else if (item == 4)
    scatter(reinterpret_cast<const uint32_t*>(from), reinterpret_cast<uint32_t*>(to), loops,
            num_loops);
  else
    scatter(reinterpret_cast<const uint64_t*>(from), reinterpret_cast<uint64_t*>(to), loops,
            num_loops);
}

Block find_block(const Box& box, int64_t gap, int64_t most) {
  Block block{box.num_loops, 1, 1};
  while (block.first_loop > 0) {
    const Loop& loop = box.loops[block.first_loop - 1];
    if (loop.source_stride - block.span > gap) break;
    block.first_loop--;
    block.step = loop.count;
    if (loop.source_stride)
      block.step = std::min(loop.count, (most - block.span) / loop.source_stride + 1);
    block.span += (block.step - 1) * loop.source_stride;
    if (block.step < loop.count) break;
  }
  return block;
}

int64_t Box::target_end() const {
  int64_t end = target_start + 1;
  for (int k = 0; k < num_loops; k++) end += (loops[k].count - 1) * loops[k].target_stride;
  return end;
}

void Box::drop_outer_loop(int64_t index) {
  target_start += index * loops[0].target_stride;
  source_start += index * loops[0].source_stride;
  num_loops--;
  for (int k = 0; k < num_loops; k++) loops[k] = loops[k + 1];
}
