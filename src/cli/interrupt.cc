#include "cli/interrupt.h"

#include <atomic>
#include <csignal>

namespace zipcache::cli {
namespace {

std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // else a signal handler may not touch it

}  // namespace

void catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = [](int /*signal*/) { interrupted.store(true); };
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  sigaction(SIGINT, &action, nullptr);
}

bool is_interrupted() { return interrupted.load(); }

}  // namespace zipcache::cli
