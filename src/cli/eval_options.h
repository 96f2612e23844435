// The flags of `zipcache eval`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "eval/task.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11's name
class App;
}

namespace zipcache::cli {

// How the scored half of a window is read: at once, as in a prompt, or token by token, so that
// staging and sealing act as in generation.
enum class ReadingStyle : std::uint8_t { kPrompt, kDecode };

struct EvalOptions {
  eval::TaskOptions task;
  std::vector<std::string> policies{"default"};
  std::string model_path;
  std::string out_folder;  // "" = nothing is kept
  std::string json_path;

  std::uint32_t n_ctx = 0;  // 0 = 2048 for ppl, else as many tokens as needed
  std::uint32_t n_ubatch = 256;
  std::uint32_t skip_percent = 0;  // ppl: of a text's windows, left out at its beginning
  std::int32_t n_threads = 0;
  ReadingStyle style = ReadingStyle::kPrompt;
  std::string chat_template;

  std::string plugin_path;
  bool is_verbose = false;
};

void add_eval_options(CLI::App& command, EvalOptions& options);

}  // namespace zipcache::cli
