// Which bytes of an output file have their final content, so that a reader can follow the writers.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

class Written {
 public:
  // Notes that n bytes from `first` on are written. Every byte is noted once, in any order.
  void add(int64_t first, int64_t n);

  // All bytes before this one are written.
  int64_t prefix() const { return prefix_.load(std::memory_order_acquire); }

 private:
  std::mutex mutex_;
  std::atomic<int64_t> prefix_{0};
  std::map<int64_t, int64_t> later_;  // first byte and end of the runs behind the prefix
};
