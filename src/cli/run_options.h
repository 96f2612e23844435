// The flags of `zipcache run`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "cli/session.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11's name
class App;
}

namespace zipcache::cli {

struct RunOptions {
  std::string model_path;
  std::string text_path;  // "" = no file, "-" = standard input
  std::string prompt;
  std::string system;
  std::string chat_template;
  bool is_raw = false;
  std::size_t max_text_tokens = 0;

  std::size_t n_predict = 256;
  std::uint32_t n_ctx = 0;
  std::uint32_t n_batch = 512;
  std::uint32_t n_ubatch = 512;
  std::int32_t n_threads = 0;
  SamplingOptions sampling;

  bool is_plain = false;
  std::map<std::string, std::string> settings;  // of the cache, by setting name

  std::string json_path;
  std::string plugin_path;
  bool is_verbose = false;
};

// Adds the flags to `command`; parsing fills `options`, which must outlive it.
void add_run_options(CLI::App& command, RunOptions& options);

// Adds a flag for each setting of the cache; parsing fills `settings`, which must outlive it.
void add_setting_options(CLI::App& command, std::map<std::string, std::string>& settings);

// Also for `version`, which loads the plug-in too.
void add_plugin_option(CLI::App& command, std::string& path);

}  // namespace zipcache::cli
