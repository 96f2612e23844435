#include "cli/eval_options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <thread>

#include "cli/run_options.h"

namespace zipcache::cli {
namespace {

constexpr std::uint32_t kMaxContext = 1u << 30;

CLI::Validator at_least(std::uint32_t min) { return CLI::Range(min, kMaxContext).description(""); }

void add_what(CLI::App& command, EvalOptions& options) {
  command
      .add_option("policies", options.policies,
                  "caches to compare with fp16: default, name=value,..., q8_0, q4_0 (default: "
                  "default)")
      ->type_name("POLICY");
  command.add_option("-m,--model", options.model_path, "model, a GGUF file")
      ->type_name("FILE")
      ->required();
  command
      .add_option("--task", options.task.name,
                  "ppl, lines, gsm8k, humaneval, longbench or agreement (default ppl)")
      ->type_name("NAME")
      ->default_val("ppl");
  command
      .add_option("--data", options.task.files,
                  "text or JSON lines, here or in the data folder; repeat for more (default: the "
                  "task's)")
      ->type_name("FILE")
      ->allow_extra_args(false);
  command
      .add_option("--data-folder", options.task.data_folder,
                  "where data is looked for (default: ../shared/data beside the project)")
      ->type_name("DIR")
      ->envname("ZIPCACHE_DATA");
  command
      .add_option("--items,--chunks", options.task.max_items,
                  "windows or prompts, of each file (default 0: all; lines 100, agreement 32)")
      ->type_name("N");
  command
      .add_option("--skip-percent", options.skip_percent,
                  "ppl: leave out this share of each text, from its beginning (default 0)")
      ->type_name("N")
      ->check(CLI::Range(0, 99).description(""));
}

void add_task_options(CLI::App& command, EvalOptions& options) {
  const std::map<std::string, ReadingStyle> styles = {{"prompt", ReadingStyle::kPrompt},
                                                      {"decode", ReadingStyle::kDecode}};
  command
      .add_option("--style", options.style,
                  "ppl: read the scored half at once (prompt) or token by token (decode)")
      ->type_name("STYLE")
      ->transform(CLI::CheckedTransformer(styles, CLI::ignore_case).description(""));
  command.add_option("--lines", options.task.n_lines, "lines: of a made-up record (default 20)")
      ->type_name("N");
  command.add_option("--seed", options.task.seed, "lines: of the made-up records (default 0)")
      ->type_name("N");
  command
      .add_option("--prompt-tokens", options.task.n_prompt,
                  "agreement: tokens of a prompt (default 256)")
      ->type_name("N");
  command
      .add_option("-n,--n-predict", options.task.n_predict,
                  "longest answer in tokens (default: the task's)")
      ->type_name("N");
  command.add_flag("--chat", options.task.is_chat,
                   "lines, gsm8k: ask in the model's chat template");
  command
      .add_option("--chat-template", options.chat_template,
                  "one of llama.cpp's by name (default: the model's)")
      ->type_name("NAME");
  command.add_flag("--execute", options.task.may_execute,
                   "humaneval: run what the model wrote, in a sandbox");
}

void add_compute_options(CLI::App& command, EvalOptions& options) {
  options.n_threads = static_cast<std::int32_t>(std::max(1u, std::thread::hardware_concurrency()));
  command
      .add_option("-c,--ctx-size", options.n_ctx,
                  "ppl: tokens of a window (default 2048); else of the context (default 0: as "
                  "needed)")
      ->type_name("N")
      ->check(at_least(0));
  command
      .add_option("--ubatch-size", options.n_ubatch,
                  "tokens computed at once, also as -ub (default 256)")
      ->type_name("N")
      ->check(at_least(1));
  command.add_option("-t,--threads", options.n_threads, "threads (default: all cores)")
      ->type_name("N")
      ->check(CLI::Range(1, 512).description(""));
}

}  // namespace

void add_eval_options(CLI::App& command, EvalOptions& options) {
  add_what(command, options);
  add_task_options(command, options);
  add_compute_options(command, options);
  command
      .add_option("--out", options.out_folder,
                  "folder that keeps everything; the same command goes on where it stopped")
      ->type_name("DIR");
  command.add_option("--json", options.json_path, "write the results, one JSON line per policy")
      ->type_name("FILE");
  add_plugin_option(command, options.plugin_path);
  command.add_flag("-v,--verbose", options.is_verbose, "print the log of llama.cpp");
}

}  // namespace zipcache::cli
