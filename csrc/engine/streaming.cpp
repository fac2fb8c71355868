#include "engine/streaming.h"

#include <algorithm>
#include <cerrno>
#include <mutex>

#include "engine/workers.h"

namespace {

const int64_t kPage = 4096;
struct Chunk {
  int64_t segment, first, elements;
};

// Elements from the start of a segment to the first place in its file that is a multiple of `most`
// elements: writes from there on fill whole pages, which the kernel then allocates many at a time.
int64_t lead(const Segment& s, int64_t most) {
  const int64_t item = int64_t(item_bytes(s.output_type));
  if (s.output_fd < 0 || s.output_offset % item || most * item % kPage) return 0;
  return (most - s.output_offset / item % most) % most;
}

std::vector<Chunk> cut(const std::vector<Segment>& segments, int64_t most, bool aligned) {
  std::vector<Chunk> chunks;
  for (size_t s = 0; s < segments.size(); s++) {
    int64_t next = aligned ? lead(segments[s], most) : 0;
    next = next ? next : most;
    for (int64_t at = 0; at < segments[s].elements; at = next, next += most)
      chunks.push_back({int64_t(s), at, std::min(next, segments[s].elements) - at});
  }
  return chunks;
}

bool inside(const Piece& p, const Chunk& c) {
  return p.segment == c.segment && p.first >= c.first && p.first < c.first + c.elements;
}

size_t first_piece(const std::vector<Piece>& pieces, const Chunk& c) {
  const auto before = [](const Piece& p, const Chunk& chunk) {
    return p.segment != chunk.segment ? p.segment < chunk.segment : p.first < chunk.first;
  };
  return size_t(std::lower_bound(pieces.begin(), pieces.end(), c, before) - pieces.begin());
}

struct Worker {
  Memory memory;
  std::vector<const void*> inputs;
  std::vector<DType> types;
  char *out, *scratch;
  std::vector<double> gram_space;
};

class SumMerge {
 public:
  SumMerge(const Engine& engine, const std::vector<Segment>& segments, const GramJob& grams)
      : engine_(engine),
        segments_(segments),
        grams_(grams),
        chunks_(cut(segments, engine.chunk_elements, grams.pieces.empty())),
        workers_(static_cast<size_t>(engine.threads)) {
    size_t widest = 1;
    for (const Segment& s : segments) {
      count_ = std::max(count_, s.inputs.size());
      widest = std::max(widest, item_bytes(s.output_type));
      for (const SourcePtr& input : s.inputs) {
        widest = std::max(widest, item_bytes(input->type()));
        scratch_bytes_ = std::max(scratch_bytes_, input->scratch_bytes(engine.chunk_elements));
      }
    }
    engine.wide_runs->keep(kWidePerInput * count_);
    stride_ = (size_t(engine.chunk_elements) * widest + 4095) / 4096 * 4096;
  }

  MergeResult run() {
    for_each_item(int64_t(chunks_.size()), engine_.threads, [&](int worker, int64_t item) {
      return merge(&workers_[size_t(worker)], chunks_[size_t(item)]);
    });
    return result_;
  }

 private:
  bool fail(int error, const Chunk& c, int64_t input, bool nonfinite) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (result_.segment < 0) result_ = {error, c.segment, c.first, input, nonfinite};
    return false;
  }

  bool merge(Worker* worker, const Chunk& c) {
    const Segment& s = segments_[size_t(c.segment)];
    if (!worker->memory && !allocate(worker)) return fail(ENOMEM, c, -1, false);
    if (!read(worker, s, c)) return false;
    take_grams(worker, c);
    if (!s.weights.empty() && !write(worker, s, c)) return false;
    __atomic_fetch_add(engine_.elements_done, c.elements, __ATOMIC_RELAXED);
    return true;
  }

  bool allocate(Worker* worker) const {
    worker->memory = page_aligned(stride_ * (count_ + 1) + scratch_bytes_);
    if (!worker->memory) return false;
    worker->inputs.resize(count_);
    worker->types.resize(count_);
    worker->out = worker->memory.get() + stride_ * count_;
    worker->scratch = worker->out + stride_;
    worker->gram_space.resize(grams_.pieces.empty() ? 0 : gram_scratch(grams_.branches));
    return true;
  }

  bool read(Worker* worker, const Segment& s, const Chunk& c) {
    const Reading reading{engine_.kernels, engine_.remote, engine_.wide_runs};
    for (size_t k = 0; k < s.inputs.size(); k++) {
      char* buffer = worker->memory.get() + stride_ * k;
      worker->inputs[k] = buffer;
      worker->types[k] = s.inputs[k]->type();
      const int error = s.inputs[k]->read(reading, c.first, c.elements, buffer, worker->scratch);
      if (error) return fail(error, c, int64_t(k), false);
    }
    return true;
  }

  void take_grams(Worker* worker, const Chunk& c) const {
    const size_t gram_size = size_t(grams_.branches) * size_t(grams_.branches);
    const std::vector<Piece>& pieces = grams_.pieces;
    for (size_t p = first_piece(pieces, c); p < pieces.size() && inside(pieces[p], c); p++)
      engine_.kernels.delta_gram(worker->inputs.data(), worker->types.data(), grams_.branches,
                                 grams_.from_base, pieces[p].first - c.first, pieces[p].elements,
                                 grams_.gram + p * gram_size, worker->gram_space.data());
  }

  bool write(Worker* worker, const Segment& s, const Chunk& c) {
    const int64_t item = int64_t(item_bytes(s.output_type));
    const int64_t at = s.output_offset + c.first * item;
    const bool in_memory = s.output_fd < 0;
    char* out = in_memory ? reinterpret_cast<char*>(at) : worker->out;
    const bool finite = engine_.kernels.weighted_average(
        worker->inputs.data(), worker->types.data(), s.weights.data(), int(s.weights.size()), out,
        s.output_type, c.elements);
    if (!finite && !engine_.allow_nonfinite) return fail(0, c, -1, true);
    if (in_memory) return true;
    const int error = write_output(engine_, s, out, c.elements * item, at);
    return error ? fail(error, c, -1, false) : true;
  }

  const Engine& engine_;
  const std::vector<Segment>& segments_;
  const GramJob& grams_;
  const std::vector<Chunk> chunks_;
  std::vector<Worker> workers_;
  size_t count_ = 0;  // inputs, at most
  size_t stride_;     // bytes from one input's buffer to the next
  size_t scratch_bytes_ = 0;
  std::mutex mutex_;
  MergeResult result_{0, -1, 0, -1, false};
};

}  // namespace

int write_output(const Engine& engine, const Segment& segment, const char* p, int64_t n,
                 int64_t at) {
  const int error = write_all(segment.output_fd, p, size_t(n), at, engine.write_early);
  if (!error && engine.written && segment.output_fd >= 0) engine.written->add(at, n);
  return error;
}

MergeResult merge_sums(const Engine& engine, const std::vector<Segment>& segments,
                       const GramJob& grams) {
  return SumMerge(engine, segments, grams).run();
}
