#include "cli/calibrate_command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <thread>

#include "cli/cache_report.h"
#include "cli/host_log.h"
#include "cli/interrupt.h"
#include "cli/model.h"
#include "cli/plugin.h"
#include "cli/run_options.h"
#include "cli/session.h"
#include "eval/data_file.h"
#include "eval/windows.h"
#include "policy/calibration.h"

namespace zipcache::cli {
namespace {

constexpr std::uint32_t kMinWindowTokens = 16;

// The windows of the text's first tokens, as `eval --task ppl` cuts them.
Expected<std::vector<eval::Window>> read_windows(const CalibrateOptions& options,
                                                 const Model& model, const std::string& path) {
  const Expected<std::string> text = eval::read_data(path);
  if (!text) {
    return text.error();
  }
  const std::size_t n_ctx =
      std::min({std::size_t{options.n_ctx}, options.n_tokens, std::size_t{model.n_ctx_train()}});
  Expected<std::vector<eval::Window>> windows =
      eval::cut_windows(model.tokenize_text(*text), n_ctx, options.n_tokens / n_ctx, model.bos());
  if (!windows) {
    return invalid_argument(path + ": " + windows.error().message);
  }
  return windows;
}

Expected<Progress> read_all(Session& session, const std::vector<eval::Window>& windows) {
  for (std::size_t index = 0; index < windows.size(); ++index) {
    session.clear();
    Expected<Progress> read = session.read(windows[index].tokens, [](std::size_t) {});
    if (!read || *read == Progress::kStopped) {
      return read;
    }
    fmt::print(stderr, "calibrate: {} of {} windows of {} tokens\n", index + 1, windows.size(),
               windows[index].tokens.size());
  }
  return Progress::kDone;
}

}  // namespace

void add_calibrate_options(CLI::App& command, CalibrateOptions& options) {
  constexpr std::uint32_t kMaxTokens = 1u << 30;
  const auto range = [](std::uint32_t min) { return CLI::Range(min, kMaxTokens).description(""); };
  options.n_threads = static_cast<std::int32_t>(std::max(1u, std::thread::hardware_concurrency()));
  command.add_option("-m,--model", options.model_path, "model, a GGUF file")
      ->type_name("FILE")
      ->required();
  command
      .add_option("--data", options.data,
                  "text to read, here or in the data folder (default: its Moby Dick); not one that "
                  "is evaluated later")
      ->type_name("FILE");
  command
      .add_option("--data-folder", options.data_folder,
                  "where data is looked for (default: ../shared/data beside the project)")
      ->type_name("DIR")
      ->envname("ZIPCACHE_DATA");
  command.add_option("-o,--out", options.out_path, "file to write")->type_name("FILE")->required();
  command
      .add_option("--tokens", options.n_tokens,
                  "tokens of the text, in whole windows (default 16384)")
      ->type_name("N")
      ->check(range(kMinWindowTokens));
  command.add_option("-c,--ctx-size", options.n_ctx, "tokens of a window (default 2048)")
      ->type_name("N")
      ->check(range(kMinWindowTokens));
  command
      .add_option("--ubatch-size", options.n_ubatch,
                  "tokens computed at once, also as -ub (default 256)")
      ->type_name("N")
      ->check(range(1));
  command.add_option("-t,--threads", options.n_threads, "threads (default: all cores)")
      ->type_name("N")
      ->check(CLI::Range(1, 512).description(""));
  add_plugin_option(command, options.plugin_path);
  command.add_flag("-v,--verbose", options.is_verbose, "print the log of llama.cpp");
}

Expected<RunEnd> calibrate(const CalibrateOptions& options) {
  install_host_log(options.is_verbose);
  // Better to fail now than after minutes of work; what is there stays until there is something
  // new.
  if (!std::ofstream(options.out_path, std::ios::app)) {
    return invalid_argument("can't write " + options.out_path + ": " + std::strerror(errno));
  }
  const Expected<std::string> text_path = eval::find_data(options.data_folder, options.data);
  if (!text_path) {
    return text_path.error();
  }
  const Expected<Plugin> plugin = Plugin::load(options.plugin_path);
  if (!plugin) {
    return plugin.error();
  }
  if (Status configured =
          plugin->configure({{"policy", "fp16"}, {"observe", "on"}, {"report", "0"}});
      !configured) {
    return configured.error();
  }
  const Expected<Model> model = Model::load(options.model_path, plugin->device());
  if (!model) {
    return model.error();
  }
  const Expected<std::string> fingerprint = eval::fingerprint(options.model_path);
  if (!fingerprint) {
    return fingerprint.error();
  }
  const auto windows = read_windows(options, *model, *text_path);
  if (!windows) {
    return windows.error();
  }
  catch_interrupts();
  const auto n_ctx = static_cast<std::uint32_t>(windows->front().tokens.size());
  Expected<Session> session = Session::open(*model, {.n_ctx = n_ctx,
                                                     .n_batch = options.n_ubatch,
                                                     .n_ubatch = options.n_ubatch,
                                                     .n_threads = options.n_threads,
                                                     .sampling = {},
                                                     .should_stop = is_interrupted});
  if (!session) {
    return session.error();
  }
  if (has_plugin_warning()) {
    return unsupported(options.model_path + ": " + explain_failure(""));
  }
  print_kept_lines();
  const Expected<Progress> read = read_all(*session, *windows);
  if (!read) {
    return read.error();
  }
  if (*read == Progress::kStopped) {
    return RunEnd::kInterrupted;
  }

  Expected<policy::Calibration> calibration = parse_calibration_report(plugin->report_json());
  if (!calibration) {
    return calibration.error();
  }
  calibration->model = model->file_name();
  calibration->model_fingerprint = *fingerprint;
  calibration->text = eval::data_name(*text_path);
  calibration->n_tokens = windows->size() * n_ctx;
  std::ofstream file(options.out_path, std::ios::binary);
  if (!(file << policy::calibration_text(*calibration)).flush()) {
    return invalid_argument("can't write " + options.out_path + ": " + std::strerror(errno));
  }
  fmt::print("{}: {} layers of {}, {} tokens of {}\n", options.out_path, calibration->layers.size(),
             calibration->model, calibration->n_tokens, calibration->text);
  return RunEnd::kDone;
}

}  // namespace zipcache::cli
