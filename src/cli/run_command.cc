#include "cli/run_command.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <optional>

#include "cli/cache_report.h"
#include "cli/chat_prompt.h"
#include "cli/host_log.h"
#include "cli/interrupt.h"
#include "cli/model.h"
#include "cli/plugin.h"
#include "cli/text_input.h"
#include "cli/utf8_stream.h"

namespace zipcache::cli {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

Expected<PromptParts> read_input(const RunOptions& options) {
  PromptParts parts{.text = {},
                    .question = options.prompt,
                    .system = options.system,
                    .max_text_tokens = options.max_text_tokens,
                    .is_raw = options.is_raw,
                    .chat_template = options.chat_template};
  const bool is_piped = options.text_path.empty() && options.prompt.empty() && !is_stdin_terminal();
  if (is_piped || !options.text_path.empty()) {
    Expected<std::string> text = read_text(is_piped ? "-" : options.text_path);
    if (!text) {
      return text.error();
    }
    parts.text = std::move(*text);
  }
  if (parts.text.empty() && parts.question.empty()) {
    return invalid_argument("nothing to read: give --prompt TEXT, --file FILE or text on stdin");
  }
  return parts;
}

// The context that the prompt and the answer need.
Expected<std::uint32_t> choose_context(const RunOptions& options, const Model& model,
                                       std::size_t n_prompt) {
  const std::size_t limit = options.n_ctx == 0 ? model.n_ctx_train() : options.n_ctx;
  if (n_prompt >= limit) {
    return invalid_argument(fmt::format(
        "the prompt has {} tokens, but the context {} {}: shorten the text (--max-prompt-tokens){}",
        n_prompt, options.n_ctx == 0 ? "of the model only" : "is only", limit,
        options.n_ctx == 0 ? "" : " or raise -c"));
  }
  if (options.n_ctx > model.n_ctx_train()) {
    fmt::print(stderr, "note: the model was trained for {} tokens of context, -c asks for {}\n",
               model.n_ctx_train(), options.n_ctx);
  }
  const std::size_t needed = n_prompt + options.n_predict;
  return static_cast<std::uint32_t>(options.n_ctx == 0 ? std::min(needed, limit) : limit);
}

// Tells on stderr how far reading is: one line that is rewritten on a terminal, few lines else.
class ReadingProgress {
 public:
  explicit ReadingProgress(std::size_t n_tokens) : n_tokens_(n_tokens) {}

  void show(std::size_t n_read) {
    const bool is_last = n_read == n_tokens_;
    if (!is_terminal_ && !is_last && seconds_since(shown_) < kSecondsBetweenLines) {
      return;
    }
    shown_ = Clock::now();
    fmt::print(stderr, "{}reading: {:>3} %, {} of {} tokens, {:.1f} tok/s{}",
               is_terminal_ ? "\r" : "", 100 * n_read / n_tokens_, n_read, n_tokens_,
               double(n_read) / seconds_since(start_), is_terminal_ && !is_last ? "" : "\n");
  }

 private:
  static constexpr double kSecondsBetweenLines = 5.0;

  const std::size_t n_tokens_;
  const bool is_terminal_ = isatty(STDERR_FILENO) == 1;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point shown_ = start_;
};

void print_text(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

Expected<Progress> generate(const Model& model, Session& session, std::size_t n_predict,
                            RunStatistics& statistics) {
  Utf8Stream characters;
  Expected<Progress> progress = Progress::kDone;
  while (statistics.n_generated < n_predict) {
    const llama_token token = session.sample();
    if (model.ends_generation(token)) {
      break;
    }
    ++statistics.n_generated;
    print_text(characters.push(model.piece(token)));
    const bool is_full = statistics.n_prompt + statistics.n_generated >= session.n_ctx();
    if (statistics.n_generated == n_predict || is_full) {
      break;
    }
    const auto start = Clock::now();
    progress = session.read({&token, 1}, [&](std::size_t) { ++statistics.n_decoded; });
    statistics.decode_seconds += seconds_since(start);
    if (!progress || *progress == Progress::kStopped) {
      break;
    }
  }
  print_text(characters.finish() + "\n");
  return progress;
}

Expected<Progress> read_and_answer(const Model& model, Session& session, std::size_t n_predict,
                                   std::span<const llama_token> prompt, RunStatistics& statistics) {
  ReadingProgress shown(prompt.size());
  const auto start = Clock::now();
  Expected<Progress> progress = session.read(prompt, [&](std::size_t n_read) {
    statistics.n_prompt = n_read;
    shown.show(n_read);
  });
  statistics.prefill_seconds = seconds_since(start);
  if (!progress || *progress == Progress::kStopped) {
    return progress;
  }
  return generate(model, session, n_predict, statistics);
}

// Loads and configures the plug-in; nothing with --plain.
Expected<std::optional<Plugin>> prepare_plugin(const RunOptions& options) {
  if (options.is_plain) {
    if (!options.settings.empty()) {
      return invalid_argument("--plain has no cache settings, but " +
                              options.settings.begin()->first + " was given");
    }
    return std::optional<Plugin>();
  }
  Expected<Plugin> plugin = Plugin::load(options.plugin_path);
  if (!plugin) {
    return plugin.error();
  }
  auto settings = options.settings;
  settings.emplace("report", "0");  // this program prints its own table
  if (Status configured = plugin->configure(settings); !configured) {
    return configured.error();
  }
  return std::optional<Plugin>(std::move(*plugin));
}

Status report(const RunOptions& options, const std::optional<Plugin>& plugin,
              const Session& session, const RunStatistics& statistics, std::ofstream& json_file) {
  const Expected<CacheReport> cache =
      plugin ? parse_report(plugin->report_json())
             : plain_report(session.state_bytes(), statistics.n_prompt + statistics.n_decoded);
  if (!cache) {
    return cache.error();
  }
  fmt::print(stderr, "\n{}", to_table(*cache, statistics));
  if (json_file.is_open() && !(json_file << to_json(*cache, statistics)).flush()) {
    return invalid_argument("can't write " + options.json_path);
  }
  return ok_status();
}

}  // namespace

Expected<RunEnd> run(const RunOptions& options) {
  install_host_log(options.is_verbose);
  std::ofstream json_file;  // opened first: better to fail now than after minutes of work
  if (!options.json_path.empty()) {
    json_file.open(options.json_path);
    if (!json_file) {
      return invalid_argument("can't write " + options.json_path);
    }
  }
  const Expected<std::optional<Plugin>> plugin = prepare_plugin(options);
  if (!plugin) {
    return plugin.error();
  }
  const Expected<PromptParts> parts = read_input(options);
  if (!parts) {
    return parts.error();
  }
  const Expected<Model> model =
      Model::load(options.model_path, *plugin ? (*plugin)->device() : nullptr);
  if (!model) {
    return model.error();
  }
  const auto prompt = make_prompt(*model, *parts);
  if (!prompt) {
    return prompt.error();
  }
  if (prompt->empty()) {
    return invalid_argument("nothing to read: the text is empty");
  }
  const Expected<std::uint32_t> n_ctx = choose_context(options, *model, prompt->size());
  if (!n_ctx) {
    return n_ctx.error();
  }
  catch_interrupts();
  Expected<Session> session = Session::open(*model, {.n_ctx = *n_ctx,
                                                     .n_batch = options.n_batch,
                                                     .n_ubatch = options.n_ubatch,
                                                     .n_threads = options.n_threads,
                                                     .sampling = options.sampling,
                                                     .should_stop = is_interrupted});
  if (!session) {
    return session.error();
  }
  if (has_plugin_warning()) {
    return unsupported(options.model_path + ": " + explain_failure(""));
  }
  print_kept_lines();

  RunStatistics statistics{
      .model = model->file_name(), .seed = options.sampling.seed, .n_threads = options.n_threads};
  const Expected<Progress> progress =
      read_and_answer(*model, *session, options.n_predict, *prompt, statistics);
  if (!progress) {
    return progress.error();
  }
  if (Status reported = report(options, *plugin, *session, statistics, json_file); !reported) {
    return reported.error();
  }
  print_kept_lines();
  return *progress == Progress::kStopped ? RunEnd::kInterrupted : RunEnd::kDone;
}

}  // namespace zipcache::cli
