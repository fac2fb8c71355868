// Workers that take items from a shared counter; results do not depend on their number.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

struct FreeMemory {
  void operator()(char* p) const { std::free(p); }
};
typedef std::unique_ptr<char, FreeMemory> Memory;

inline Memory page_aligned(size_t bytes) {
  return Memory(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
}

// Memory of each worker that lasts from one tensor to the next, so that its pages are touched once.
class Pool {
 public:
  explicit Pool(int workers) : parts_(static_cast<size_t>(workers)) {}

  // At least so many bytes, of any content; null if there are none.
  char* get(int worker, size_t bytes) {
    Part& part = parts_[size_t(worker)];
    if (part.bytes < bytes) {
      part.memory.reset();
      part.memory = page_aligned(bytes);
      part.bytes = part.memory ? bytes : 0;
    }
    return part.memory.get();
  }

 private:
  struct Part {
    Memory memory;
    size_t bytes = 0;
  };
  std::vector<Part> parts_;
};

// Calls body(worker, item) for items 0 .. count - 1; the first false stops all workers.
template <class Body>
void for_each_item(int64_t count, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  auto work = [&](int worker) {
    while (!stop) {
      const int64_t item = next.fetch_add(1);
      if (item >= count) return;
      if (!body(worker, item)) stop = true;
    }
  };
  std::vector<std::thread> pool;
  try {
    for (int t = 1; t < threads && t < count; t++) pool.emplace_back(work, t);
  } catch (const std::system_error&) {  // no more threads: those that run do all the work
  }
  work(0);
  for (auto& thread : pool) thread.join();
}
