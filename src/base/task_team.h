// Threads that would wait for one of them may take a share of its work: fork and join without
// threads of its own, for a pool that belongs to somebody else.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>

namespace zipcache {

// A round: one thread calls start(), before any other comes; then one leads with any number of
// for_each() and a finish(), and the others help() until that.
class TaskTeam {
 public:
  using Task = std::function<void(std::size_t index)>;

  void start() { is_finished_.store(false, std::memory_order_relaxed); }

  // Calls task(0..n-1), each once, in any order, on this thread and on those that help; returns
  // when all are done. The first exception of a task is thrown here. REQUIRES: n < 2^32.
  void for_each(std::size_t n, const Task& task);
  void finish() { is_finished_.store(true, std::memory_order_release); }

  void help();

 private:
  // Does one task, if there is one left.
  bool take_one();

  // Loop number << 32 | tasks not taken yet. Only who lowers it may look at task_: the loop can't
  // end, nor another begin, before the task taken is done.
  std::atomic<std::uint64_t> open_{0};
  std::atomic<std::size_t> n_done_{0};
  std::atomic<bool> is_finished_{true};
  std::atomic<bool> has_failed_{false};
  const Task* task_ = nullptr;
  std::exception_ptr failure_;
};

// Ends a round, however its scope is left: helpers must not wait for ever.
class TeamRound {
 public:
  explicit TeamRound(TaskTeam* team) : team_(team) {}
  ~TeamRound() { team_->finish(); }
  TeamRound(const TeamRound&) = delete;
  TeamRound& operator=(const TeamRound&) = delete;

 private:
  TaskTeam* const team_;
};

// Without a team, one after the other.
void for_each(TaskTeam* team, std::size_t n, const TaskTeam::Task& task);

}  // namespace zipcache
