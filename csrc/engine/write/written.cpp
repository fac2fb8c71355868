#include "engine/write/written.h"

#include <iterator>

void Written::add(int64_t first, int64_t n) {
  if (n < 1) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  auto run = later_.emplace(first, first + n).first;
  if (run != later_.begin() && std::prev(run)->second == first) {
    const auto before = std::prev(run);
    before->second = run->second;
    later_.erase(run);
    run = before;
  }
  const auto after = std::next(run);
  if (after != later_.end() && after->first == run->second) {
    run->second = after->second;
    later_.erase(after);
  }
  if (run->first != prefix_.load(std::memory_order_relaxed)) return;
  prefix_.store(run->second, std::memory_order_release);
  later_.erase(run);
}
