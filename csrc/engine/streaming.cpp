#include "engine/streaming.h"

#include <algorithm>
#include <cerrno>
#include <mutex>

#include "engine/workers.h"

namespace {

struct Chunk {
  int64_t segment, first, elements;
};

std::vector<Chunk> cut(const std::vector<Segment>& segments, int64_t chunk_elements) {
  std::vector<Chunk> chunks;
  for (size_t s = 0; s < segments.size(); s++)
    for (int64_t at = 0; at < segments[s].elements; at += chunk_elements)
      chunks.push_back({int64_t(s), at, std::min(chunk_elements, segments[s].elements - at)});
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
  std::vector<double> gram_space;
};

}  // namespace

MergeResult merge_sums(const Engine& engine, const std::vector<Segment>& segments,
                       const GramJob& grams) {
  const std::vector<Chunk> chunks = cut(segments, engine.chunk_elements);
  const size_t gram_size = size_t(grams.branches) * size_t(grams.branches);
  size_t count = 0, widest = 1;
  bool made = false;
  for (const Segment& s : segments) {
    count = std::max(count, s.inputs.size());
    widest = std::max(widest, item_bytes(s.output_type));
    for (const Source& input : s.inputs) {
      widest = std::max(widest, item_bytes(input.type()));
      made |= !input.scales.empty() || !input.low_rank.empty();
    }
  }
  const size_t stride = (size_t(engine.chunk_elements) * widest + 4095) / 4096 * 4096;
  const size_t scratch_bytes = made ? size_t(engine.chunk_elements) * 16 : 0;
  std::vector<Worker> workers(static_cast<size_t>(engine.threads));
  std::mutex mutex;
  MergeResult result{0, -1, 0, -1, false};
  auto fail = [&](int error, const Chunk& c, int64_t input, bool nonfinite) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (result.segment < 0) result = {error, c.segment, c.first, input, nonfinite};
    return false;
  };

  for_each_item(int64_t(chunks.size()), engine.threads, [&](int number, int64_t item) {
    Worker& worker = workers[size_t(number)];
    const Chunk& c = chunks[size_t(item)];
    const Segment& s = segments[size_t(c.segment)];
    if (!worker.memory) {
      worker.memory = page_aligned(stride * (count + 1) + scratch_bytes);
      if (!worker.memory) return fail(ENOMEM, c, -1, false);
      worker.inputs.resize(count);
      worker.types.resize(count);
      worker.gram_space.resize(grams.pieces.empty() ? 0 : gram_scratch(grams.branches));
    }
    char* const out = worker.memory.get() + stride * count;
    for (size_t k = 0; k < s.inputs.size(); k++) {
      char* buffer = worker.memory.get() + stride * k;
      worker.inputs[k] = buffer;
      worker.types[k] = s.inputs[k].type();
      if (const int e = read_source(engine.level, engine.remote, s.inputs[k], c.first, c.elements,
                                    buffer, out + stride))
        return fail(e, c, int64_t(k), false);
    }
    for (size_t p = first_piece(grams.pieces, c);
         p < grams.pieces.size() && inside(grams.pieces[p], c); p++)
      engine.level.delta_gram(worker.inputs.data(), worker.types.data(), grams.branches,
                              grams.from_base, grams.pieces[p].first - c.first,
                              grams.pieces[p].elements, grams.gram + p * gram_size,
                              worker.gram_space.data());
    if (!s.weights.empty()) {
      const bool finite =
          engine.level.weighted_average(worker.inputs.data(), worker.types.data(), s.weights.data(),
                                        int(s.weights.size()), out, s.output_type, c.elements);
      if (!finite && !engine.allow_nonfinite) return fail(0, c, -1, true);
      const size_t item_size = item_bytes(s.output_type);
      const int64_t at = s.output_offset + c.first * int64_t(item_size);
      if (const int e =
              write_all(s.output_fd, out, size_t(c.elements) * item_size, at, engine.write_early))
        return fail(e, c, -1, false);
    }
    __atomic_fetch_add(engine.elements_done, c.elements, __ATOMIC_RELAXED);
    return true;
  });
  return result;
}
