#include "streaming.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

struct Chunk {
  int64_t segment, first, elements;
};

const int kTruncated = ENODATA;  // the file ends before its header says

int read_all(int fd, char* p, size_t n, int64_t at) {
  while (n) {
    const ssize_t r = pread(fd, p, n, at);
    if (r < 0 && errno == EINTR) continue;
    if (r < 0) return errno;
    if (r == 0) return kTruncated;
    p += r, n -= size_t(r), at += r;
  }
  return 0;
}

int write_all(int fd, const char* p, size_t n, int64_t at) {
  while (n) {
    const ssize_t r = pwrite(fd, p, n, at);
    if (r < 0 && errno == EINTR) continue;
    if (r <= 0) return r < 0 ? errno : EIO;
    p += r, n -= size_t(r), at += r;
  }
  return 0;
}

std::vector<Chunk> cut(const std::vector<Segment>& segments, int64_t chunk_elements) {
  std::vector<Chunk> chunks;
  for (size_t s = 0; s < segments.size(); s++)
    for (int64_t at = 0; at < segments[s].elements; at += chunk_elements)
      chunks.push_back({int64_t(s), at, std::min(chunk_elements, segments[s].elements - at)});
  return chunks;
}

size_t widest_item(const std::vector<Segment>& segments) {
  size_t bytes = 1;
  for (const Segment& s : segments) {
    bytes = std::max(bytes, item_bytes(s.output_type));
    for (DType t : s.input_types) bytes = std::max(bytes, item_bytes(t));
  }
  return bytes;
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

struct Free {
  void operator()(char* p) const { std::free(p); }
};

}  // namespace

MergeResult merge_files(const Level& level, const std::vector<Segment>& segments, int64_t chunk_elements, int threads,
                        bool allow_nonfinite, const GramJob& grams, int64_t* elements_done) {
  const std::vector<Chunk> chunks = cut(segments, chunk_elements);
  const int count = segments.empty() ? 0 : int(segments[0].input_fds.size());
  const size_t gram_size = size_t(grams.branches) * size_t(grams.branches);
  std::atomic<size_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  MergeResult result{0, -1, 0, -1, false};
  auto fail = [&](int error, const Chunk& c, int64_t input, bool nonfinite) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!stop.exchange(true)) result = {error, c.segment, c.first, input, nonfinite};
  };

  const size_t buffer_bytes = (size_t(chunk_elements) * widest_item(segments) + 4095) / 4096 * 4096;
  auto work = [&] {
    const std::unique_ptr<char, Free> memory(
        static_cast<char*>(std::aligned_alloc(4096, buffer_bytes * size_t(count + 1))));
    if (!memory) return fail(ENOMEM, {0, 0, 0}, -1, false);
    std::vector<const void*> inputs(static_cast<size_t>(count));
    std::vector<double> scratch(grams.pieces.empty() ? 0 : gram_scratch(grams.branches));
    char* out = memory.get() + buffer_bytes * size_t(count);
    while (!stop) {
      const size_t j = next.fetch_add(1);
      if (j >= chunks.size()) return;
      const Chunk& c = chunks[j];
      const Segment& s = segments[size_t(c.segment)];
      for (int k = 0; k < count; k++) {
        char* buffer = memory.get() + buffer_bytes * size_t(k);
        const size_t item = item_bytes(s.input_types[size_t(k)]);
        inputs[size_t(k)] = buffer;
        if (const int e = read_all(s.input_fds[size_t(k)], buffer, size_t(c.elements) * item,
                                   s.input_offsets[size_t(k)] + c.first * int64_t(item)))
          return fail(e, c, k, false);
      }
      for (size_t p = first_piece(grams.pieces, c); p < grams.pieces.size() && inside(grams.pieces[p], c); p++)
        level.delta_gram(inputs.data(), s.input_types.data(), grams.branches, grams.from_base,
                         grams.pieces[p].first - c.first, grams.pieces[p].elements, grams.gram + p * gram_size,
                         scratch.data());
      if (!s.weights.empty()) {
        const bool finite = level.weighted_average(inputs.data(), s.input_types.data(), s.weights.data(),
                                                   int(s.weights.size()), out, s.output_type, c.elements);
        if (!finite && !allow_nonfinite) return fail(0, c, -1, true);
        const size_t item = item_bytes(s.output_type);
        const int64_t at = s.output_offset + c.first * int64_t(item);
        if (const int e = write_all(s.output_fd, out, size_t(c.elements) * item, at)) return fail(e, c, -1, false);
      }
      __atomic_fetch_add(elements_done, c.elements, __ATOMIC_RELAXED);
    }
  };

  std::vector<std::thread> pool;
  try {
    for (int t = 1; t < threads; t++) pool.emplace_back(work);
  } catch (const std::system_error&) {  // the system gives no more threads: those there are write the same bytes
  }
  work();
  for (auto& thread : pool) thread.join();
  return result;
}
