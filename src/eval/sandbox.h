// Runs a Python program that nobody has read: in a process of its own with limits on time, memory,
// files and processes, in an empty folder, without the caller's environment, without rights of
// root, and without a network where the system lets a process give it up.
#pragma once

#include <cstddef>
#include <string>

#include "base/expected.h"

namespace zipcache::eval {

struct SandboxLimits {
  double seconds = 10;  // both of wall time and of computing
  std::size_t memory_bytes = std::size_t{1} << 30;
  std::size_t file_bytes = std::size_t{1} << 20;
};

struct SandboxResult {
  bool succeeded = false;  // ended by itself, in time, with exit code 0
  bool has_network = false;
};

// An error when no process could be made or there is no python3.
Expected<SandboxResult> run_python(const std::string& program, const SandboxLimits& limits);

}  // namespace zipcache::eval
