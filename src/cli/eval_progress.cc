#include "cli/eval_progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

namespace zipcache::cli {
namespace {

constexpr auto kTimeBetweenLines = std::chrono::seconds(10);

}  // namespace

EvalProgress::EvalProgress(std::size_t n_samples, std::size_t n_done)
    : n_samples_(n_samples),
      n_before_(n_done),
      n_done_(n_done),
      is_terminal_(isatty(STDERR_FILENO) == 1) {
  if (n_done > 0) {
    fmt::print(stderr, "eval: {} of {} samples are there already\n", n_done, n_samples);
  }
}

void EvalProgress::finish(const std::string& policy, const std::string& item) {
  ++n_done_;
  const bool is_last = n_done_ == n_samples_;
  const auto now = Clock::now();
  if (!is_terminal_ && !is_last && n_done_ > n_before_ + 1 && now - shown_ < kTimeBetweenLines) {
    return;
  }
  shown_ = now;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double left = seconds / double(n_done_ - n_before_) * double(n_samples_ - n_done_);
  fmt::print(stderr, "{}eval: {} of {} samples, {:.0f} s, about {:.0f} s left ({}, {}){}",
             is_terminal_ ? "\r\x1b[K" : "", n_done_, n_samples_, seconds, left, policy, item,
             is_terminal_ && !is_last ? "" : "\n");
}

}  // namespace zipcache::cli
