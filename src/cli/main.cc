// zipcache: the command line. Parses, dispatches, and turns whatever goes wrong into one line.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "bench/bench_command.h"
#include "cli/calibrate_command.h"
#include "cli/eval_command.h"
#include "cli/eval_options.h"
#include "cli/ratio_command.h"
#include "cli/run_command.h"
#include "cli/run_options.h"
#include "cli/version_command.h"

namespace zipcache::cli {
namespace {

enum ExitCode : int { kOk = 0, kFailed = 1, kBadUsage = 2, kInterrupted = 130 };

int fail(ExitCode code, const std::string& message) {
  std::string line = message.substr(0, message.find_last_not_of('\n') + 1);
  std::replace(line.begin(), line.end(), '\n', ' ');
  fmt::print(stderr, "zipcache: {}\n", line);
  return code;
}

// Arguments last first, as CLI11 takes them. It knows long names with two dashes only, but
// llama.cpp made "-ub" a habit.
std::vector<std::string> reversed_arguments(int argc, char** argv) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  std::replace(arguments.begin(), arguments.end(), std::string("-ub"),
               std::string("--ubatch-size"));
  std::reverse(arguments.begin(), arguments.end());
  return arguments;
}

// As it was typed, files without their folders, and without where results go.
std::string command_line(int argc, char** argv) {
  std::string line = "zipcache";
  for (int i = 1; i < argc; ++i) {
    if (argv[i] == std::string_view("--json")) {
      ++i;
      continue;
    }
    const std::filesystem::path path(argv[i]);
    std::error_code ignored;
    const bool is_file = path.has_parent_path() && std::filesystem::exists(path, ignored);
    line.append(" ").append(is_file ? path.filename().string() : argv[i]);
  }
  return line;
}

int dispatch(int argc, char** argv) {
  CLI::App app("KV-cache compression for llama.cpp models", "zipcache");
  app.set_version_flag("--version", std::string("zipcache ") + version());
  app.require_subcommand(1);
  RunOptions run_options;
  CLI::App* run_app = app.add_subcommand("run", "Read a text, answer, and show what it cost");
  add_run_options(*run_app, run_options);
  EvalOptions eval_options;
  CLI::App* eval_app =
      app.add_subcommand("eval", "Measure what caches do to predictions and answers");
  add_eval_options(*eval_app, eval_options);
  CalibrateOptions calibrate_options;
  CLI::App* calibrate_app = app.add_subcommand(
      "calibrate", "Find out about a model's channels, for the policies that ask for it");
  add_calibrate_options(*calibrate_app, calibrate_options);
  RatioOptions ratio_options;
  CLI::App* ratio_app = app.add_subcommand("ratio", "How much smaller a cache is, by its shape");
  add_ratio_options(*ratio_app, ratio_options);
  VersionOptions version_options;
  CLI::App* version_app = app.add_subcommand("version", "Version; -v for all that is loaded");
  version_app->add_flag("-v,--verbose", version_options.is_verbose, "plug-in, kernels, devices");
  add_plugin_option(*version_app, version_options.plugin_path);
  CLI::App* bench_app = app.add_subcommand("bench", "Speed beside llama.cpp's own cache types");
  bench::BenchCommand bench_command(*bench_app, command_line(argc, argv));

  try {
    app.parse(reversed_arguments(argc, argv));
  } catch (const CLI::Success& asked_for) {  // --help, --version
    return app.exit(asked_for);
  } catch (const CLI::ParseError& error) {
    return fail(kBadUsage, std::string(error.what()) + " (see zipcache --help)");
  }
  // Read by now. The plug-in refuses ZIPCACHE_ variables that are no settings of its own.
  unsetenv("ZIPCACHE_PLUGIN");
  unsetenv("ZIPCACHE_DATA");

  if (version_app->parsed()) {
    print_version(version_options);
    return kOk;
  }
  if (bench_app->parsed()) {
    const Status done = bench_command.run();
    return done ? kOk : fail(kFailed, done.error().message);
  }
  if (ratio_app->parsed()) {
    const Status printed = print_ratios(ratio_options);
    return printed ? kOk : fail(kFailed, printed.error().message);
  }
  const Expected<RunEnd> end = eval_app->parsed()        ? evaluate(eval_options)
                               : calibrate_app->parsed() ? calibrate(calibrate_options)
                                                         : run(run_options);
  if (!end) {
    return fail(kFailed, end.error().message);
  }
  return *end == RunEnd::kInterrupted ? kInterrupted : kOk;
}

}  // namespace
}  // namespace zipcache::cli

int main(int argc, char** argv) {
  try {
    return zipcache::cli::dispatch(argc, argv);
  } catch (const std::exception& error) {
    return zipcache::cli::fail(zipcache::cli::kFailed, error.what());
  }
}
