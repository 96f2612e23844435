#include "cli/host_log.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <utility>
#include <vector>

#include "llama.h"

namespace zipcache::cli {
namespace {

constexpr std::string_view kPluginPrefix = "zipcache: ";
constexpr std::string_view kLoadingError = "error loading model: ";

struct HostLog {
  std::mutex mutex;
  bool is_verbose = false;
  ggml_log_level level = GGML_LOG_LEVEL_NONE;  // of the line that is being written
  std::string line;                            // without its end yet
  std::vector<std::string> kept;
};

HostLog& host_log() {
  static HostLog log;
  return log;
}

bool is_plugin(const std::string& line) { return line.starts_with(kPluginPrefix); }

void end_line(HostLog& log) {
  const bool is_error = log.level == GGML_LOG_LEVEL_ERROR;
  const bool is_plugin_warning = log.level == GGML_LOG_LEVEL_WARN && is_plugin(log.line);
  if ((is_error || is_plugin_warning) && !log.line.empty()) {
    log.kept.push_back(log.line);
  }
  if (log.is_verbose) {
    fmt::print(stderr, "{}\n", log.line);
  }
  log.line.clear();
}

void receive(ggml_log_level level, const char* text, void* /*user_data*/) {
  HostLog& log = host_log();
  const std::lock_guard lock(log.mutex);
  if (level != GGML_LOG_LEVEL_CONT) {
    log.level = level;
  }
  for (; *text != '\0'; ++text) {
    if (*text == '\n') {
      end_line(log);
    } else {
      log.line += *text;
    }
  }
}

// "llama_model_load: error loading model: X" -> "X", "some_function: X" -> "X"
std::string_view without_origin(std::string_view line) {
  if (const std::size_t at = line.find(kLoadingError); at != std::string_view::npos) {
    return line.substr(at + kLoadingError.size());
  }
  const std::size_t colon = line.find(": ");
  const bool is_function =
      colon != std::string_view::npos && line.substr(0, colon).find(' ') == std::string_view::npos;
  return is_function ? line.substr(colon + 2) : line;
}

}  // namespace

void install_host_log(bool verbose) {
  host_log().is_verbose = verbose;
  llama_log_set(receive, nullptr);
}

bool has_plugin_warning() {
  HostLog& log = host_log();
  const std::lock_guard lock(log.mutex);
  return std::any_of(log.kept.begin(), log.kept.end(), is_plugin);
}

std::string explain_failure(std::string_view fallback) {
  HostLog& log = host_log();
  const std::lock_guard lock(log.mutex);
  const std::vector<std::string> lines = std::exchange(log.kept, {});
  if (lines.empty()) {
    return std::string(fallback);
  }
  // The plug-in says what to do, and the loader sums up what it found, unless it only repeats the
  // file's name. Otherwise the first line is the cause and the others are its consequences.
  const auto is_summary = [](const std::string& line) {
    return line.find(kLoadingError) != std::string::npos &&
           line.find("failed to load model from") == std::string::npos;
  };
  auto best = std::find_if(lines.begin(), lines.end(), is_plugin);
  if (best == lines.end()) {
    best = std::find_if(lines.begin(), lines.end(), is_summary);
  }
  return std::string(without_origin(best == lines.end() ? lines.front() : *best));
}

void print_kept_lines() {
  HostLog& log = host_log();
  const std::lock_guard lock(log.mutex);
  for (const std::string& line : std::exchange(log.kept, {})) {
    if (!log.is_verbose) {
      fmt::print(stderr, "{}\n", line);
    }
  }
}

}  // namespace zipcache::cli
