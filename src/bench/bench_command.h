// `zipcache bench`: speed beside llama.cpp's own cache types, measured in the same run.
#pragma once

#include <memory>
#include <string>

#include "base/expected.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11's name
class App;
}

namespace zipcache::bench {

class BenchCommand {
 public:
  // Adds the subcommands to `command`; `command_line` is what records are said to come from.
  BenchCommand(CLI::App& command, std::string command_line);
  ~BenchCommand();

  // Runs the one that was parsed.
  Status run();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace zipcache::bench
