// Time that this process has computed, all threads together: on a shared machine it says more than
// time on the wall.
#pragma once

#include <ctime>

namespace zipcache::cli {

inline double cpu_seconds() {
  std::timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

}  // namespace zipcache::cli
