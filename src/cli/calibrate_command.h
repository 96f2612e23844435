// `zipcache calibrate`: a model reads a text, and what its keys, values and queries were per
// channel becomes a file for the policies that need one (policy/calibration.h).
#pragma once

#include <cstdint>
#include <string>

#include "base/expected.h"
#include "cli/run_command.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11's name
class App;
}

namespace zipcache::cli {

struct CalibrateOptions {
  std::string model_path;
  std::string data = "books/pg2701_moby_dick.txt";
  std::string data_folder;
  std::string out_path;
  std::size_t n_tokens = 16384;
  std::uint32_t n_ctx = 2048;
  std::uint32_t n_ubatch = 256;
  std::int32_t n_threads = 0;
  std::string plugin_path;
  bool is_verbose = false;
};

void add_calibrate_options(CLI::App& command, CalibrateOptions& options);

Expected<RunEnd> calibrate(const CalibrateOptions& options);

}  // namespace zipcache::cli
