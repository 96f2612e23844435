#include "cli/run_options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <thread>

#include "policy/policy.h"

namespace zipcache::cli {
namespace {

constexpr std::uint32_t kMaxContext = 1u << 30;

// Without CLI11's words for it, which would crowd the list of flags.
template <typename T>
CLI::Validator range(T min, T max) {
  return CLI::Range(min, max).description("");
}

void add_text_options(CLI::App& command, RunOptions& options) {
  command.add_option("-m,--model", options.model_path, "model, a GGUF file")
      ->type_name("FILE")
      ->required();
  command.add_option("--file", options.text_path, "text to read before the prompt; - is stdin")
      ->type_name("FILE");
  command.add_option("-p,--prompt", options.prompt, "what to answer or continue")
      ->type_name("TEXT");
  command.add_option("--system", options.system, "system message of the chat")->type_name("TEXT");
  command
      .add_option("--chat-template", options.chat_template,
                  "one of llama.cpp's by name (default: the model's)")
      ->type_name("NAME");
  command.add_flag("--raw", options.is_raw, "continue the text, without a chat template");
  command
      .add_option("--max-prompt-tokens", options.max_text_tokens,
                  "cut the text (not the prompt that follows it) to its first N tokens")
      ->type_name("N");
}

void add_compute_options(CLI::App& command, RunOptions& options) {
  const unsigned n_cores = std::max(1u, std::thread::hardware_concurrency());
  options.n_threads = static_cast<std::int32_t>(n_cores);
  command.add_option("-n,--n-predict", options.n_predict, "most tokens to generate (default 256)")
      ->type_name("N");
  command
      .add_option("-c,--ctx-size", options.n_ctx,
                  "context in tokens (default 0: as many as needed, up to the model's)")
      ->type_name("N")
      ->check(range(0u, kMaxContext));
  command
      .add_option("-b,--batch-size", options.n_batch, "tokens per step of reading (default 512)")
      ->type_name("N")
      ->check(range(1u, kMaxContext));
  command
      .add_option("--ubatch-size", options.n_ubatch,
                  "tokens computed at once, also as -ub (default 512)")
      ->type_name("N")
      ->check(range(1u, kMaxContext));
  command.add_option("-t,--threads", options.n_threads, "threads (default: all cores)")
      ->type_name("N")
      ->check(range(1, 512));
}

void add_sampling_options(CLI::App& command, SamplingOptions& sampling) {
  command.add_option("--seed", sampling.seed, "of sampling (default 0)")->type_name("N");
  command.add_option("--temp", sampling.temperature, "temperature (default 0: likeliest token)")
      ->type_name("T")
      ->check(range(0.0f, 100.0f));
  command.add_option("--top-k", sampling.top_k, "likeliest tokens kept (default 40; 0 = all)")
      ->type_name("N")
      ->check(range(0, INT32_MAX));
  command.add_option("--top-p", sampling.top_p, "probability kept (default 0.95; 1 = all)")
      ->type_name("P")
      ->check(range(0.0f, 1.0f));
  command
      .add_option("--min-p", sampling.min_p, "least share of the likeliest token's (default 0.05)")
      ->type_name("P")
      ->check(range(0.0f, 1.0f));
}

// The cache's own seed is another one than that of sampling.
std::string flag_of(const std::string& setting) {
  return setting == "seed" ? "--probe-seed" : "--" + setting;
}

constexpr const char* kCacheGroup = "KV cache";

}  // namespace

void add_setting_options(CLI::App& command, std::map<std::string, std::string>& settings) {
  for (const policy::SettingHelp& help : policy::setting_help()) {
    command
        .add_option_function<std::string>(
            flag_of(help.name),
            [&settings, name = help.name](const std::string& value) { settings[name] = value; },
            help.help + "; takes " + help.values)
        ->type_name("VALUE")
        ->group(kCacheGroup);
  }
}

void add_plugin_option(CLI::App& command, std::string& path) {
  command
      .add_option("--plugin", path, "libggml-zipcache.so (default: ../lib or beside this program)")
      ->type_name("FILE")
      ->envname("ZIPCACHE_PLUGIN");
}

void add_run_options(CLI::App& command, RunOptions& options) {
  add_text_options(command, options);
  add_compute_options(command, options);
  add_sampling_options(command, options.sampling);
  command
      .add_flag("--plain", options.is_plain,
                "llama.cpp's own FP16 cache on the CPU instead, for comparison")
      ->group(kCacheGroup);
  add_setting_options(command, options.settings);
  command.add_option("--json", options.json_path, "write what the run cost as JSON")
      ->type_name("FILE");
  add_plugin_option(command, options.plugin_path);
  command.add_flag("-v,--verbose", options.is_verbose, "print the log of llama.cpp");
}

}  // namespace zipcache::cli
