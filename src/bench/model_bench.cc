#include "bench/model_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>

#include "bench/host_attention.h"
#include "bench/measure.h"
#include "cli/cache_report.h"
#include "cli/host_log.h"
#include "cli/model.h"
#include "cli/plugin.h"
#include "llama.h"

namespace zipcache::bench {
namespace {

constexpr std::uint32_t kUbatch = 512;
// While a cache is filled, tokens see this many before them. Reading all of it as a prompt would
// take llama.cpp's quantized caches an hour, and what is stored is as much.
constexpr std::uint32_t kFillWindow = 512;
constexpr llama_seq_id kSequence = 0, kFilling = 1;

// A context and the times it took.
class Contender {
 public:
  std::string name;
  std::vector<double> prompt_seconds, generate_seconds;
  std::vector<double> policy_shares;  // of prompt_seconds: saliency and sealing

  Status open(const cli::Model& model, ggml_type type, std::uint32_t n_ctx) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = n_ctx;
    params.n_batch = params.n_ubatch = kUbatch;
    params.n_seq_max = 2;
    params.kv_unified = true;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = params.type_v = type;
    context_.reset(llama_init_from_model(model.get(), params));
    n_vocab_ = static_cast<std::uint32_t>(llama_vocab_n_tokens(llama_model_get_vocab(model.get())));
    return context_ ? ok_status()
                    : Status(unsupported(name + ": can't make a context: " +
                                         cli::explain_failure("llama.cpp does not say why")));
  }

  void set_threads(std::uint32_t n) {
    llama_set_n_threads(context_.get(), static_cast<int>(n), static_cast<int>(n));
  }

  // Chunks join the sequence through another one, which sees only the end of it.
  Status fill(std::uint32_t n_tokens) {
    llama_memory_t memory = llama_get_memory(context_.get());
    for (; n_filled_ < n_tokens; n_filled_ += std::min(kUbatch, n_tokens - n_filled_)) {
      const std::uint32_t n = std::min(kUbatch, n_tokens - n_filled_);
      const auto begin = static_cast<llama_pos>(n_filled_);
      llama_memory_seq_cp(memory, kSequence, kFilling,
                          std::max(0, begin - static_cast<llama_pos>(kFillWindow)), begin);
      if (Status done = decode(kFilling, n_filled_, n); !done) {
        return done;
      }
      llama_memory_seq_cp(memory, kFilling, kSequence, begin, -1);
      llama_memory_seq_rm(memory, kFilling, -1, -1);
    }
    return ok_status();
  }

  // Reads a prompt behind the tokens that are there and takes it back.
  Status read(std::uint32_t n_tokens) {
    Status done = ok_status();
    prompt_seconds.push_back(seconds_of([&] { done = decode(kSequence, n_filled_, n_tokens); }));
    return rewind(std::move(done));
  }
  Status generate(std::uint32_t n_tokens, std::vector<double>* seconds) {
    Status done = ok_status();
    const double taken = seconds_of([&] {
      for (std::uint32_t i = 0; done && i < n_tokens; ++i) {
        done = decode(kSequence, n_filled_ + i, 1);
      }
    });
    if (seconds != nullptr) {
      seconds->push_back(taken);
    }
    return rewind(std::move(done));
  }

 private:
  struct Free {
    void operator()(llama_context* context) const { llama_free(context); }
  };
  struct Batch {
    llama_batch batch = llama_batch_init(kUbatch, 0, 1);
    Batch() = default;
    ~Batch() { llama_batch_free(batch); }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;
  };

  // Random tokens, the same for all contenders.
  Status decode(llama_seq_id sequence, std::uint32_t first, std::uint32_t n) {
    llama_batch& batch = batch_->batch;
    batch.n_tokens = static_cast<std::int32_t>(n);
    for (std::uint32_t i = 0; i < n; ++i) {
      batch.token[i] = static_cast<llama_token>((first + i) * 2654435761u % n_vocab_);
      batch.pos[i] = static_cast<llama_pos>(first + i);
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = sequence;
      batch.logits[i] = i + 1 == n ? 1 : 0;
    }
    const int status = llama_decode(context_.get(), batch);
    llama_synchronize(context_.get());
    return status == 0 ? ok_status()
                       : Status(out_of_memory(name + ": llama.cpp could not compute tokens: " +
                                              cli::explain_failure("no reason given")));
  }

  Status rewind(Status done) {
    llama_memory_seq_rm(llama_get_memory(context_.get()), kSequence,
                        static_cast<llama_pos>(n_filled_), -1);
    return done;
  }

  std::unique_ptr<llama_context, Free> context_;
  std::unique_ptr<Batch> batch_ = std::make_unique<Batch>();
  std::uint32_t n_filled_ = 0;
  std::uint32_t n_vocab_ = 0;
};

std::string policy_name(const std::map<std::string, std::string>& settings) {
  std::string name;
  for (const auto& [key, value] : settings) {
    name.append(name.empty() ? "" : ",").append(key).append("=").append(value);
  }
  return name.empty() ? "default" : name;
}

class ModelBench {
 public:
  ModelBench(const ModelOptions& options, const Records& records)
      : options_(options), records_(records) {}

  Status open() {
    Expected<cli::Plugin> plugin = cli::Plugin::load(options_.plugin_path);
    if (!plugin) {
      return plugin.error();
    }
    plugin_ = *plugin;
    auto settings = options_.settings;
    settings.emplace("report", "0");
    if (Status configured = plugin->configure(settings); !configured) {
      return configured;
    }
    for (ggml_backend_dev_t device : {plugin->device(), ggml_backend_dev_t{nullptr}}) {
      Expected<cli::Model> model = cli::Model::load(options_.model_path, device);
      if (!model) {
        return model.error();
      }
      models_.push_back(std::make_unique<cli::Model>(std::move(*model)));
    }
    if (Status added = add(policy_name(options_.settings), *models_[0], GGML_TYPE_F16); !added) {
      return added;
    }
    for (const std::string& name : options_.peers) {
      const Expected<ggml_type> type = cache_type(name);
      if (!type) {
        return type.error();
      }
      if (Status added = add(name, *models_[1], *type); !added) {
        return added;
      }
    }
    if (cli::has_plugin_warning()) {
      return unsupported(options_.model_path + ": " + cli::explain_failure(""));
    }
    return ok_status();
  }

  Status measure(std::uint32_t depth) {
    for (const auto& contender : contenders_) {
      contender->set_threads(options_.threads.back());
      if (Status filled = contender->fill(depth); !filled) {
        return filled;
      }
    }
    for (const std::uint32_t n_threads : options_.threads) {
      for (const auto& contender : contenders_) {
        contender->set_threads(n_threads);
        contender->prompt_seconds.clear();
        contender->generate_seconds.clear();
        contender->policy_shares.clear();
        if (Status warm = contender->generate(1, nullptr); !warm) {
          return warm;
        }
      }
      for (std::uint32_t round = 0; round < options_.rounds; ++round) {
        for (const auto& contender : contenders_) {
          if (Status done = contender->generate(options_.n_generate, &contender->generate_seconds);
              !done) {
            return done;
          }
          if (Status done = read(contender.get()); !done) {
            return done;
          }
        }
      }
      if (Status added = record(depth, n_threads); !added) {
        return added;
      }
    }
    return ok_status();
  }

 private:
  Status read(Contender* contender) {
    if (contender != contenders_.front().get()) {
      return contender->read(options_.n_prompt);
    }
    const Expected<double> before = policy_seconds();
    if (!before) {
      return before.error();
    }
    if (Status done = contender->read(options_.n_prompt); !done) {
      return done;
    }
    const Expected<double> after = policy_seconds();
    if (!after) {
      return after.error();
    }
    contender->policy_shares.push_back((*after - *before) / contender->prompt_seconds.back());
    return ok_status();
  }

  Expected<double> policy_seconds() const {
    const Expected<cli::CacheReport> report = cli::parse_report(plugin_->report_json());
    if (!report) {
      return report.error();
    }
    return report->policy_seconds;
  }

  Status add(const std::string& name, const cli::Model& model, ggml_type type) {
    const std::uint32_t deepest = *std::max_element(options_.depths.begin(), options_.depths.end());
    auto contender = std::make_unique<Contender>();
    contender->name = name;
    // As llama.cpp pads it; a chunk of filling may go beyond the deepest point.
    Status opened = contender->open(
        model, type,
        (deepest + std::max(options_.n_prompt, options_.n_generate) + 255) / 256 * 256);
    contenders_.push_back(std::move(contender));
    return opened;
  }

  Status record(std::uint32_t depth, std::uint32_t n_threads) {
    const double f16_prompt = seconds_of_f16(&Contender::prompt_seconds);
    const double f16_generate = seconds_of_f16(&Contender::generate_seconds);
    for (const auto& contender : contenders_) {
      const auto rate = [](std::uint32_t n, const std::vector<double>& seconds) {
        const double middle = median(seconds);
        return std::pair(n / middle, n / middle * spread(seconds) / middle);
      };
      const auto [prefill, prefill_spread] = rate(options_.n_prompt, contender->prompt_seconds);
      const auto [decode, decode_spread] = rate(options_.n_generate, contender->generate_seconds);
      nlohmann::json record = {{"bench", "model"},
                               {"model", models_.front()->file_name()},
                               {"policy", contender->name},
                               {"n_depth", depth},
                               {"n_prompt", options_.n_prompt},
                               {"n_gen", options_.n_generate},
                               {"threads", n_threads},
                               {"rounds", options_.rounds},
                               {"prefill_tok_s", prefill},
                               {"prefill_spread", prefill_spread},
                               {"decode_tok_s", decode},
                               {"decode_spread", decode_spread}};
      if (!contender->policy_shares.empty()) {
        record["prefill_policy_share"] = median(contender->policy_shares);
      }
      std::string versus;
      if (f16_prompt > 0) {
        const double prefill_ratio = f16_prompt / median(contender->prompt_seconds);
        const double decode_ratio = f16_generate / median(contender->generate_seconds);
        record["prefill_vs_f16"] = prefill_ratio;
        record["decode_vs_f16"] = decode_ratio;
        versus = fmt::format("  {:.2f}x {:.2f}x of f16", prefill_ratio, decode_ratio);
      }
      fmt::print(
          "{:<10} depth {:>6} threads {}: pp{} {:.1f} ± {:.1f} tok/s  tg{} {:.1f} ± {:.1f} "
          "tok/s{}\n",
          contender->name, depth, n_threads, options_.n_prompt, prefill, prefill_spread,
          options_.n_generate, decode, decode_spread, versus);
      std::fflush(stdout);
      if (Status added = records_.add(std::move(record)); !added) {
        return added;
      }
    }
    return ok_status();
  }

  double seconds_of_f16(std::vector<double> Contender::*seconds) const {
    for (const auto& contender : contenders_) {
      if (contender->name == "f16") {
        return median(*contender.*seconds);
      }
    }
    return 0.0;
  }

  const ModelOptions& options_;
  const Records& records_;
  std::optional<cli::Plugin> plugin_;
  std::vector<std::unique_ptr<cli::Model>> models_;     // on the plug-in's device, on the CPU
  std::vector<std::unique_ptr<Contender>> contenders_;  // ours is the first
};

}  // namespace

Status bench_model(const ModelOptions& options, const Records& records) {
  if (options.n_prompt == 0 || options.n_prompt > kUbatch || options.n_generate == 0) {
    return invalid_argument(
        fmt::format("1 to {} prompt tokens and at least 1 generated one needed", kUbatch));
  }
  cli::install_host_log(/*verbose=*/false);
  ModelBench bench(options, records);
  if (Status opened = bench.open(); !opened) {
    return opened;
  }
  std::vector<std::uint32_t> depths = options.depths;
  std::sort(depths.begin(), depths.end());
  for (const std::uint32_t depth : depths) {
    if (Status done = bench.measure(depth); !done) {
      return done;
    }
  }
  return ok_status();
}

}  // namespace zipcache::bench
