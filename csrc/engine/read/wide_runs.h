// Wide runs of elements that workers share. A transposed tensor gives a short chunk only by many
// short reads; a run many times as long costs hardly more of them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "engine/workers.h"

struct Wide {
  const void* source;
  int64_t number;
  std::mutex mutex;  // held while it is filled
  bool is_filled = false;
  int error = 0;
  Memory memory;
};

// The latest runs of all sources of a merge.
class WideRuns {
 public:
  // Keeps at least so many; one that a worker still reads goes after that.
  void keep(size_t most) {
    const std::lock_guard<std::mutex> lock(mutex_);
    most_ = std::max(most_, most);
  }

  std::shared_ptr<Wide> get(const void* source, int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const std::shared_ptr<Wide>& run : runs_)
      if (run->source == source && run->number == number) return run;
    if (runs_.size() >= most_) runs_.pop_front();
    runs_.push_back(std::make_shared<Wide>());
    runs_.back()->source = source;
    runs_.back()->number = number;
    return runs_.back();
  }

 private:
  std::mutex mutex_;
  size_t most_ = 1;
  std::deque<std::shared_ptr<Wide>> runs_;
};
