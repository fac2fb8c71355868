#include "engine/read/boxes.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace {

// A wide run is filled for chunks of at least this part of it.
const int64_t kWorthwhileShare = 64;

bool is_run(const Loop& loop) { return loop.target_stride == 1 && loop.source_stride == 1; }

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

// One row of a table. Returns the number of its elements.
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

}  // namespace

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

struct BoxesSource::Window {
  const Reading& reading;
  int64_t first, n;
  int64_t most;  // elements for which there is scratch
  char *out, *scratch;
};

BoxesSource::BoxesSource(std::vector<SourcePtr> sources, const BoxTable& table, DType type,
                         int64_t wide)
    : sources_(std::move(sources)), type_(type) {
  for (const SourcePtr& source : sources_) {
    if (type != DType::F64 && source->type() != type)
      throw std::invalid_argument("BoxesSource: a source has another type");
    gap_ = std::max(gap_, source->worthwhile_gap());
  }
  std::vector<std::pair<int64_t, int64_t>> order;  // start in the target, row of the table
  Box box;
  for (int64_t size : table.shape) elements_ *= size;
  int64_t left = elements_;
  for (int64_t part = 0; part < table.parts; part++) {
    const int64_t elements = fill_box(table, part, &box);
    if (box.source < 0 || box.source >= int64_t(sources_.size()))
      throw std::invalid_argument("BoxesSource: a box has no source");
    if (elements) order.push_back({box.target_start, part});
    left -= elements;
  }
  if (left) throw std::invalid_argument("BoxesSource: boxes must fill their tensor once");
  std::sort(order.begin(), order.end());
  for (const auto& [start, part] : order) {
    fill_box(table, part, &box);
    store(box);
    if (is_turned(box)) wide_ = wide;
  }
  boxes_.shrink_to_fit();
  latest_.resize(boxes_.size());
  find_latest(0, boxes_.size());
}

// Keeps a box that starts behind the last one, or makes the last run longer.
void BoxesSource::store(const Box& box) {
  if (!boxes_.empty() && box.num_loops == 1 && is_run(box.loops[0])) {
    Stored& last = boxes_.back();
    Loop& run = loops_.back();
    if (last.source == box.source && last.num_loops == 1 && is_run(run) &&
        last.target_end == box.target_start && last.source_start + run.count == box.source_start) {
      run.count += box.loops[0].count;
      last.target_end = box.target_end();
      return;
    }
  }
  boxes_.push_back({.source = box.source,
                    .target_start = box.target_start,
                    .source_start = box.source_start,
                    .target_end = box.target_end(),
                    .first_loop = uint32_t(loops_.size()),
                    .num_loops = uint32_t(box.num_loops)});
  loops_.insert(loops_.end(), box.loops, box.loops + box.num_loops);
}

int64_t BoxesSource::find_latest(size_t low, size_t high) {
  if (low == high) return 0;
  const size_t middle = (low + high) / 2;
  const int64_t around = std::max(find_latest(low, middle), find_latest(middle + 1, high));
  return latest_[middle] = std::max(around, boxes_[middle].target_end);
}

size_t BoxesSource::scratch_bytes(int64_t n) const {
  size_t most = 0;
  for (const SourcePtr& source : sources_)
    most = std::max(
        most, source->type() == type_ ? source->scratch_bytes(n) : double_scratch(*source, n));
  return round_up(size_t(n) * item_bytes(type_)) + most;
}

int BoxesSource::read(const Reading& reading, int64_t first, int64_t n, char* out,
                      char* scratch) const {
  const bool is_long = n * kWorthwhileShare >= wide_;
  if (wide_ && is_long && reading.wide_runs) return read_wide(reading, first, n, out, scratch);
  return read_boxes({reading, first, n, n, out, scratch}, 0, boxes_.size());
}

// Whether neighbours in the target lie so far apart in the source that each takes a call.
bool BoxesSource::is_turned(const Box& box) const {
  const Loop& inner = box.loops[box.num_loops - 1];
  const int64_t gap = sources_[size_t(box.source)]->worthwhile_gap();
  return inner.target_stride == 1 && std::abs(inner.source_stride) > gap;
}

int BoxesSource::read_wide(const Reading& reading, int64_t first, int64_t n, char* out,
                           char* scratch) const {
  const int64_t item = int64_t(item_bytes(type_));
  for (int64_t done = 0, m = 0; done < n; done += m) {
    const int64_t number = (first + done) / wide_;
    const int64_t inside = first + done - number * wide_;
    m = std::min(n - done, wide_ - inside);
    const std::shared_ptr<Wide> run = reading.wide_runs->get(this, number);
    const int error = fill(reading, run.get(), n, scratch);
    if (error) return error;
    std::memcpy(out + done * item, run->memory.get() + inside * item, size_t(m * item));
  }
  return 0;
}

// Fills a run unless another worker has done it. most: elements for which there is scratch.
int BoxesSource::fill(const Reading& reading, Wide* run, int64_t most, char* scratch) const {
  const std::lock_guard<std::mutex> lock(run->mutex);
  if (run->is_filled) return run->error;
  const int64_t first = run->number * wide_;
  const int64_t n = std::min(wide_, elements_ - first);
  run->memory = page_aligned(size_t(n) * item_bytes(type_));
  run->error = ENOMEM;
  if (run->memory)
    run->error =
        read_boxes({reading, first, n, most, run->memory.get(), scratch}, 0, boxes_.size());
  run->is_filled = true;
  return run->error;
}

int BoxesSource::read_boxes(const Window& window, size_t low, size_t high) const {
  if (low == high) return 0;
  const size_t middle = (low + high) / 2;
  const int64_t end = window.first + window.n;
  if (latest_[middle] <= window.first || boxes_[low].target_start >= end) return 0;
  int error = read_boxes(window, low, middle);
  const Stored& stored = boxes_[middle];
  if (!error && stored.target_start < end && stored.target_end > window.first) {
    Box box{stored.source, stored.target_start, stored.source_start, int(stored.num_loops), {}};
    std::copy_n(loops_.begin() + stored.first_loop, stored.num_loops, box.loops);
    error = read_inside(window, box);
  }
  return error ? error : read_boxes(window, middle + 1, high);
}

// Reads those elements of a box that lie in the window: whole boxes of the outer loop's indices
// that lie inside, and parts of those at the ends.
int BoxesSource::read_inside(const Window& window, Box box) const {
  const int64_t low = window.first - box.target_start;
  const int64_t high = low + window.n;
  const Loop outer = box.loops[0];
  const int64_t extent = box.target_end() - box.target_start;
  const int64_t inner = extent - (outer.count - 1) * outer.target_stride;  // of one index
  if (high <= 0 || low >= extent) return 0;
  const auto indices_before = [&](int64_t place) {  // indices that start before it
    const int64_t count = place <= 0 ? 0 : (place - 1) / outer.target_stride + 1;
    return std::min(count, outer.count);
  };
  const int64_t begin = indices_before(low - inner + 1);  // the first that ends behind low
  const int64_t end = indices_before(high);
  const int64_t whole_begin = std::min(indices_before(low), end);
  const int64_t whole_end = std::max(indices_before(high - inner + 1), whole_begin);
  int error = 0;
  for (int64_t i = begin; i < end && !error; i++) {
    Box part = box;
    if (i == whole_begin && i < whole_end) {
      part.loops[0].count = whole_end - i;
      part.target_start += i * outer.target_stride;
      part.source_start += i * outer.source_stride;
      error = read_box(window, part);
      i = whole_end - 1;
    } else {
      part.drop_outer_loop(i);
      error = part.num_loops ? read_inside(window, part) : read_box(window, part);
    }
  }
  return error;
}

// Reads a whole box in the order of its source, block by block.
int BoxesSource::read_box(const Window& window, Box box) const {
  for (int k = 0; k < box.num_loops; k++) {
    Loop& loop = box.loops[k];
    if (loop.source_stride >= 0) continue;
    box.source_start += (loop.count - 1) * loop.source_stride;
    box.target_start += (loop.count - 1) * loop.target_stride;
    loop = {loop.count, -loop.target_stride, -loop.source_stride};
  }
  for (int k = 1; k < box.num_loops; k++)
    for (int j = k; j > 0 && box.loops[j - 1].source_stride < box.loops[j].source_stride; j--)
      std::swap(box.loops[j - 1], box.loops[j]);
  const int64_t gap = sources_[size_t(box.source)]->worthwhile_gap();
  return read_blocks(window, &box, find_block(box, gap, window.most), 0);
}

int BoxesSource::read_blocks(const Window& window, Box* box, const Block& block, int loop) const {
  if (loop == box->num_loops) return read_block(window, *box, loop, 1);
  const int64_t target_start = box->target_start;
  const int64_t source_start = box->source_start;
  Loop& cut = box->loops[loop];
  const Loop whole = cut;
  const bool is_block = loop == block.first_loop;
  const int64_t step = is_block ? block.step : 1;
  int error = 0;
  for (int64_t i = 0; i < whole.count && !error; i += step) {
    box->target_start = target_start + i * whole.target_stride;
    box->source_start = source_start + i * whole.source_stride;
    cut.count = std::min(step, whole.count - i);
    const int64_t span = block.span - (step - cut.count) * whole.source_stride;
    error =
        is_block ? read_block(window, *box, loop, span) : read_blocks(window, box, block, loop + 1);
  }
  box->target_start = target_start;
  box->source_start = source_start;
  cut = whole;
  return error;
}

// Reads `span` elements of a source and brings those of the inner loops to their places.
int BoxesSource::read_block(const Window& window, const Box& box, int first_loop,
                            int64_t span) const {
  const Source& source = *sources_[size_t(box.source)];
  const size_t item = item_bytes(type_);
  char* out = window.out + (box.target_start - window.first) * int64_t(item);
  const bool is_narrow = source.type() != type_;
  const int num_loops = box.num_loops - first_loop;
  const bool in_place = num_loops == 0 || (num_loops == 1 && is_run(box.loops[first_loop]));
  char* values = in_place ? out : window.scratch;
  char* scratch = window.scratch + (in_place ? 0 : round_up(size_t(window.most) * item));
  const int error = is_narrow
                        ? read_doubles(window.reading, source, box.source_start, span,
                                       reinterpret_cast<double*>(values), scratch)
                        : source.read(window.reading, box.source_start, span, values, scratch);
  if (!error && !in_place) scatter_items(item, values, out, box.loops + first_loop, num_loops);
  return error;
}
