// How far an evaluation is, on stderr: one line that is rewritten on a terminal, few lines else.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>

namespace zipcache::cli {

class EvalProgress {
 public:
  // `n_done` of `n_samples` were done in an earlier run.
  EvalProgress(std::size_t n_samples, std::size_t n_done);

  // Another sample is done.
  void finish(const std::string& policy, const std::string& item);

 private:
  using Clock = std::chrono::steady_clock;

  const std::size_t n_samples_;
  const std::size_t n_before_;
  std::size_t n_done_;
  const bool is_terminal_;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point shown_ = start_;
};

}  // namespace zipcache::cli
