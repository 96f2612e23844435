#include "cli/eval_command.h"

#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <fstream>

#include "cli/eval_caches.h"
#include "cli/eval_progress.h"
#include "cli/eval_prompts.h"
#include "cli/eval_windows.h"
#include "cli/host_log.h"
#include "cli/interrupt.h"
#include "cli/version_command.h"
#include "eval/data_file.h"
#include "eval/results.h"
#include "policy/policy.h"

namespace zipcache::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::uint32_t kWindowTokens = 2048;
constexpr std::uint32_t kMinWindowTokens = 16;

bool is_ppl(const EvalOptions& options) { return options.task.name == "ppl"; }

// Settings in the environment would change every policy without standing in any result.
Status check_environment() {
  for (const policy::SettingHelp& help : policy::setting_help()) {
    std::string variable = "ZIPCACHE_" + help.name;
    std::transform(variable.begin(), variable.end(), variable.begin(), [](char c) {
      return c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    });
    if (std::getenv(variable.c_str()) != nullptr) {
      return invalid_argument(variable + " is set; eval takes settings from its policies alone");
    }
  }
  return ok_status();
}

Status check(const EvalOptions& options) {
  if (!is_ppl(options) && options.style == ReadingStyle::kDecode) {
    return invalid_argument("--style is for --task ppl; answers are always decoded");
  }
  if (is_ppl(options) && options.n_ctx < kMinWindowTokens) {
    return invalid_argument(
        fmt::format("a window takes at least {} tokens (-c)", kMinWindowTokens));
  }
  if (!is_ppl(options) && options.skip_percent != 0) {
    return invalid_argument("--skip-percent is for --task ppl; other tasks have no windows");
  }
  return check_environment();
}

std::string options_text(const EvalOptions& options) {
  std::string text = fmt::format("-ub {} --items {}", options.n_ubatch, options.task.max_items);
  if (is_ppl(options)) {
    text += options.style == ReadingStyle::kDecode ? " --style decode" : " --style prompt";
  }
  if (options.skip_percent != 0) {
    text += fmt::format(" --skip-percent {}", options.skip_percent);
  }
  if (options.task.name == "lines") {
    text += fmt::format(" --lines {} --seed {}", options.task.n_lines, options.task.seed);
  }
  if (options.task.name == "agreement") {
    text += fmt::format(" --prompt-tokens {}", options.task.n_prompt);
  }
  if (options.task.n_predict != 0) {
    text += fmt::format(" -n {}", options.task.n_predict);
  }
  if (options.task.is_chat) {
    text += " --chat";
  }
  if (!options.chat_template.empty()) {
    text += " --chat-template " + options.chat_template;
  }
  return text;
}

// The files that a run depends on, found and fingerprinted: {name: "size:hash"}.
Expected<Json> fingerprints(const EvalOptions& options, const EvalCaches& caches,
                            std::span<const eval::PolicySpec> policies) {
  std::vector<std::string> files = options.task.files;
  const std::vector<std::string> own = eval::default_files(options.task.name, options.task.is_chat);
  if (files.empty()) {
    files = own;
  } else if (options.task.name == "gsm8k" || options.task.name == "longbench") {
    const bool first_is_data = options.task.name == "gsm8k";  // the others are prompts and config
    files.insert(files.end(), own.begin() + (first_is_data ? 1 : 0), own.end());
  }
  Json found = Json::object();
  const auto add = [&](const std::string& path) -> Status {
    Expected<std::string> print = eval::fingerprint(path);
    if (!print) {
      return print.error();
    }
    found[eval::data_name(path)] = *print;
    return ok_status();
  };
  for (const std::string& name : files) {
    const Expected<std::string> path = eval::find_data(options.task.data_folder, name);
    if (!path) {
      return path.error();
    }
    if (Status added = add(*path); !added) {
      return added.error();
    }
  }
  for (const eval::PolicySpec& policy : policies) {
    if (const auto file = policy.settings.find("calibration"); file != policy.settings.end()) {
      if (Status added = add(file->second); !added) {
        return added.error();
      }
    }
  }
  if (Status added = add(options.model_path); !added) {
    return added.error();
  }
  if (caches.plugin()) {
    if (Status added = add(caches.plugin()->path()); !added) {
      return added.error();
    }
  }
  return found;
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) {
      return line.substr(line.find(':') + 2);
    }
  }
  return "unknown";
}

// How results came about, as docs quote it.
Json describe_run(const EvalOptions& options, std::span<const eval::PolicySpec> policies) {
  std::string command =
      fmt::format("zipcache eval -m {} --task {} -c {} {}", eval::data_name(options.model_path),
                  options.task.name, options.n_ctx, options_text(options));
  for (const std::string& file : options.task.files) {
    command += " --data " + eval::data_name(file);
  }
  for (const eval::PolicySpec& policy : policies.subspan(1)) {
    command += " " + policy.name;
  }
  const std::time_t now = std::time(nullptr);
  std::tm date{};
  gmtime_r(&now, &date);
  return {
      {"command", command},
      {"zipcache", version()},
      {"llama.cpp", fmt::format("{}, ggml {}", llama_version(), ggml_version())},
      {"cpu", cpu_model()},
      {"threads", options.n_threads},
      {"date", fmt::format("{}-{:02}-{:02}", date.tm_year + 1900, date.tm_mon + 1, date.tm_mday)}};
}

std::string data_text(const EvalOptions& options) {
  std::vector<std::string> names;
  for (const std::string& file : options.task.files.empty()
                                     ? eval::default_files(options.task.name, options.task.is_chat)
                                     : options.task.files) {
    names.push_back(eval::data_name(file));
  }
  return names.empty() ? fmt::format("{} lines, seed {}", options.task.n_lines, options.task.seed)
                       : fmt::format("{}", fmt::join(names, " "));
}

std::vector<std::string> names_of(std::span<const eval::PolicySpec> policies) {
  std::vector<std::string> names;
  for (const eval::PolicySpec& policy : policies) {
    names.push_back(policy.name);
  }
  return names;
}

// Of the items, how many samples are there.
std::size_t count_done(const eval::Journal& journal, std::span<const eval::PolicySpec> policies,
                       const std::vector<std::string>& items) {
  std::size_t n_done = 0;
  for (const eval::PolicySpec& policy : policies) {
    n_done += static_cast<std::size_t>(std::count_if(
        items.begin(), items.end(),
        [&](const std::string& item) { return journal.find(policy.name, item) != nullptr; }));
  }
  return n_done;
}

Status write_results(const EvalOptions& options, const std::vector<eval::Record>& records,
                     const std::string& markdown) {
  std::string lines;
  for (const eval::Record& record : records) {
    lines += record.dump() + "\n";
  }
  if (!options.json_path.empty()) {
    if (Status written = eval::write_file(options.json_path, lines); !written) {
      return written;
    }
  }
  if (options.out_folder.empty()) {
    return ok_status();
  }
  const std::filesystem::path folder = options.out_folder;
  if (Status written = eval::write_file((folder / "results.jsonl").string(), lines); !written) {
    return written;
  }
  return eval::write_file((folder / "results.md").string(), markdown);
}

// The text of ppl's windows, all files after each other.
Expected<std::vector<eval::Window>> read_windows(const EvalOptions& options, const Model& model) {
  std::vector<eval::Window> windows;
  for (const std::string& name :
       options.task.files.empty() ? eval::default_files("ppl", false) : options.task.files) {
    const Expected<std::string> path = eval::find_data(options.task.data_folder, name);
    if (!path) {
      return path.error();
    }
    const Expected<std::string> text = eval::read_data(*path);
    if (!text) {
      return text.error();
    }
    // As llama-perplexity does: the whole text begins a sequence, then each window does.
    std::vector<llama_token> tokens = model.tokenize_frame("", /*begins_sequence=*/true);
    const std::vector<llama_token> rest = model.tokenize_text(*text);
    tokens.insert(tokens.end(), rest.begin(), rest.end());
    Expected<std::vector<eval::Window>> cut =
        eval::cut_windows(eval::skip_windows(tokens, options.n_ctx, options.skip_percent),
                          options.n_ctx, options.task.max_items, model.bos());
    if (!cut) {
      return invalid_argument(*path + ": " + cut.error().message);
    }
    windows.insert(windows.end(), cut->begin(), cut->end());
  }
  return windows;
}

struct Outcome {
  Progress progress = Progress::kDone;
  std::vector<eval::Record> records;
  std::string text;  // for people, before the table
};

Expected<Outcome> run_ppl(const EvalCaches& caches, std::span<const eval::PolicySpec> policies,
                          const EvalOptions& options, eval::Journal& journal, const Json& base) {
  const Expected<std::vector<eval::Window>> windows = read_windows(options, caches.model());
  if (!windows) {
    return windows.error();
  }
  std::vector<std::string> items;
  for (std::size_t index = 0; index < windows->size(); ++index) {
    items.push_back(window_item(index));
  }
  EvalProgress progress(items.size() * policies.size(), count_done(journal, policies, items));
  const Expected<Progress> end =
      run_windows(caches, policies, *windows, options, journal, progress);
  if (!end) {
    return end.error();
  }
  Outcome outcome{.progress = *end, .records = {}, .text = {}};
  if (*end == Progress::kDone) {
    outcome.records = eval::window_records(journal, names_of(policies), items, base);
    for (const eval::PolicySpec& policy : policies.subspan(1)) {
      outcome.text +=
          fmt::format("{}\n\n{}\n", policy.name, eval::divergence_text(journal, policy.name));
    }
  }
  return outcome;
}

Expected<Outcome> run_task(const EvalCaches& caches, std::span<const eval::PolicySpec> policies,
                           const EvalOptions& options, const eval::Task& task,
                           eval::Journal& journal, const Json& base) {
  const Expected<PreparedPrompts> prepared = prepare_prompts(caches.model(), task, options);
  if (!prepared) {
    return prepared.error();
  }
  std::vector<std::string> items;
  for (const eval::Prompt& prompt : task.prompts()) {
    items.push_back(prompt.id);
  }
  EvalProgress progress(items.size() * policies.size(), count_done(journal, policies, items));
  const Expected<Progress> end =
      run_prompts(caches, policies, task, *prepared, options, journal, progress);
  if (!end) {
    return end.error();
  }
  Outcome outcome{.progress = *end, .records = {}, .text = {}};
  if (*end == Progress::kDone) {
    Json with_context = base;
    with_context["n_ctx"] = prepared->n_ctx;
    Expected<std::vector<eval::Record>> records =
        eval::prompt_records(journal, task, names_of(policies), with_context);
    if (!records) {
      return records.error();
    }
    outcome.records = std::move(*records);
    if (!outcome.records.front().contains("score")) {
      outcome.text = "Not judged: that takes running what the model wrote (--execute).\n\n";
    }
  }
  return outcome;
}

}  // namespace

Expected<RunEnd> evaluate(EvalOptions options) {
  install_host_log(options.is_verbose);
  if (is_ppl(options) && options.n_ctx == 0) {
    options.n_ctx = kWindowTokens;
  }
  if (Status checked = check(options); !checked) {
    return checked.error();
  }
  const Expected<std::vector<eval::PolicySpec>> policies = eval::parse_policies(options.policies);
  if (!policies) {
    return policies.error();
  }
  const Expected<EvalCaches> caches =
      EvalCaches::load(options.model_path, options.plugin_path, *policies);
  if (!caches) {
    return caches.error();
  }
  std::unique_ptr<eval::Task> task;
  if (!is_ppl(options)) {
    const Model& model = caches->model();
    Expected<std::unique_ptr<eval::Task>> made = eval::make_task(
        options.task,
        {[&](std::string_view text) { return model.tokenize_text(text); }, model.bos()});
    if (!made) {
      return made.error();
    }
    task = std::move(*made);
  }
  const Expected<Json> files = fingerprints(options, *caches, *policies);
  if (!files) {
    return files.error();
  }
  const Json run = describe_run(options, *policies);
  const Json identity = {{"task", options.task.name},
                         {"n_ctx", options.n_ctx},
                         {"options", options_text(options)},
                         {"files", *files}};
  Expected<eval::Journal> journal = eval::Journal::open(options.out_folder, identity, run);
  if (!journal) {
    return journal.error();
  }
  print_kept_lines();
  catch_interrupts();

  const Json base = {{"task", options.task.name},  {"model", caches->model().file_name()},
                     {"data", data_text(options)}, {"options", options_text(options)},
                     {"n_ctx", options.n_ctx},     {"run", run}};
  const Expected<Outcome> outcome =
      task ? run_task(*caches, *policies, options, *task, *journal, base)
           : run_ppl(*caches, *policies, options, *journal, base);
  if (!outcome) {
    return outcome.error();
  }
  if (outcome->progress == Progress::kStopped) {
    fmt::print(stderr, "\neval: stopped{}\n",
               options.out_folder.empty() ? "" : "; the same command goes on from here");
    return RunEnd::kInterrupted;
  }
  const std::string table = eval::to_markdown(outcome->records);
  fmt::print("{}{}", outcome->text, table);
  if (Status written = write_results(options, outcome->records, table); !written) {
    return written.error();
  }
  return RunEnd::kDone;
}

}  // namespace zipcache::cli
