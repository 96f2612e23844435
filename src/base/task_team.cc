#include "base/task_team.h"

#include <thread>
#include <utility>

namespace zipcache {
namespace {

// Work comes within microseconds, if at all; a machine with more threads than cores needs the rest.
class Waiting {
 public:
  void once() {
    if (++n_ % kSpins == 0) {
      std::this_thread::yield();
    }
  }

 private:
  static constexpr std::uint32_t kSpins = 256;
  std::uint32_t n_ = 0;
};

}  // namespace

bool TaskTeam::take_one() {
  std::uint64_t open = open_.load(std::memory_order_acquire);
  do {
    if (static_cast<std::uint32_t>(open) == 0) {
      return false;
    }
  } while (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acquire));
  try {
    (*task_)(static_cast<std::uint32_t>(open) - 1);
  } catch (...) {
    if (!has_failed_.exchange(true)) {
      failure_ = std::current_exception();
    }
  }
  n_done_.fetch_add(1, std::memory_order_release);
  return true;
}

void TaskTeam::for_each(std::size_t n, const Task& task) {
  task_ = &task;
  n_done_.store(0, std::memory_order_relaxed);
  const std::uint64_t loop = (open_.load(std::memory_order_relaxed) >> 32) + 1;
  open_.store(loop << 32 | n, std::memory_order_release);
  while (take_one()) {
  }
  Waiting waiting;
  while (n_done_.load(std::memory_order_acquire) < n) {
    waiting.once();
  }
  if (has_failed_.exchange(false)) {
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
}

void TaskTeam::help() {
  Waiting waiting;
  while (!is_finished_.load(std::memory_order_acquire)) {
    if (!take_one()) {
      waiting.once();
    }
  }
}

void for_each(TaskTeam* team, std::size_t n, const TaskTeam::Task& task) {
  if (team != nullptr) {
    team->for_each(n, task);
    return;
  }
  for (std::size_t i = 0; i < n; ++i) {
    task(i);
  }
}

}  // namespace zipcache
