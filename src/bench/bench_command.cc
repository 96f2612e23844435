#include "bench/bench_command.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <string>
#include <utility>
#include <vector>

#include "bench/kernel_bench.h"
#include "bench/model_bench.h"
#include "bench/op_bench.h"
#include "bench/random_model.h"
#include "bench/record.h"
#include "cli/run_options.h"

namespace zipcache::bench {
namespace {

// "32/8x128": query heads, KV heads, head size.
Expected<AttentionShape> parse_shape(const std::string& text) {
  AttentionShape shape;
  const char* at = text.data();
  const char* const end = at + text.size();
  for (const auto& [number, separator] :
       {std::pair{&shape.n_heads, '/'}, {&shape.n_kv_heads, 'x'}, {&shape.head_dim, '\0'}}) {
    const auto [stop, code] = std::from_chars(at, end, *number);
    const bool ends_well = separator == '\0' ? stop == end : stop != end && *stop == separator;
    if (code != std::errc{} || !ends_well || *number == 0) {
      return invalid_argument("shape '" + text +
                              "': expected HEADS/KV_HEADSxHEAD_DIM, as 32/8x128");
    }
    at = stop + 1;
  }
  if (shape.n_heads % shape.n_kv_heads != 0) {
    return invalid_argument("shape '" + text + "': KV heads must divide query heads");
  }
  return shape;
}

}  // namespace

struct BenchCommand::Impl {
  CLI::App* op = nullptr;
  CLI::App* kernels = nullptr;
  CLI::App* model = nullptr;
  KernelOptions kernel_options;
  ModelOptions model_options;
  std::string model_shape_name;
  OpOptions op_options;
  std::vector<std::string> shape_texts{"32/8x128", "9/3x64"};
  std::string json_path;
  std::string command_line;

  void add_op(CLI::App& command) {
    op = command.add_subcommand("op", "Attention alone, beside ggml_flash_attn_ext");
    op->add_option("--shapes", shape_texts, "HEADS/KV_HEADSxHEAD_DIM, as 32/8x128")->delimiter(',');
    op->add_option("--n-kv", op_options.n_kv, "tokens in the cache")->delimiter(',');
    op->add_option("--n-query", op_options.n_query, "of these, the newest that attend")
        ->delimiter(',');
    op->add_option("-t,--threads", op_options.threads)->delimiter(',');
    op->add_option("--peers", op_options.peers, "llama.cpp's cache types, or none")->delimiter(',');
    op->add_option("--rounds", op_options.rounds, "measurements of each, in turn");
    op->add_flag("--warm", op_options.is_warm, "don't flush the processor's caches in between");
    op->add_option("--isa", op_options.isa, "kernels to use (default: the best)");
    cli::add_setting_options(*op, op_options.settings);
  }

  Status run_op() {
    op_options.shapes.clear();
    std::erase(op_options.peers, "none");
    for (const std::string& text : shape_texts) {
      const Expected<AttentionShape> shape = parse_shape(text);
      if (!shape) {
        return shape.error();
      }
      op_options.shapes.push_back(*shape);
    }
    return bench_op(op_options, records());
  }

  void add_kernels(CLI::App& command) {
    kernels = command.add_subcommand("kernels", "Products with packed codes, one thread");
    kernels->add_option("--isas", kernel_options.isas, "tables (default: all that can run here)")
        ->delimiter(',');
    kernels->add_option("--widths", kernel_options.widths, "bits; 16 is fp16")->delimiter(',');
    kernels->add_option("--rows", kernel_options.rows, "rows of the other operand")->delimiter(',');
    kernels->add_option("--dims", kernel_options.dims, "head sizes")->delimiter(',');
    kernels->add_option("--n-tokens", kernel_options.n_tokens, "tokens of a block");
    kernels->add_option("--rounds", kernel_options.rounds, "measurements of each, in turn");
    kernels->add_flag("--warm", kernel_options.is_warm, "matrices in the processor's caches");
  }

  void add_model(CLI::App& command) {
    model = command.add_subcommand("model", "A whole model by depth, columns of llama-bench");
    model->add_option("-m,--model", model_options.model_path, "a GGUF file")->type_name("FILE");
    model->add_option(
        "--shape", model_shape_name,
        "random weights instead, written to --model unless there: " + model_shape_names());
    model->add_option("-d,--depths", model_options.depths, "tokens in the cache")->delimiter(',');
    model->add_option("-p,--n-prompt", model_options.n_prompt, "tokens read at each depth");
    model->add_option("-n,--n-gen", model_options.n_generate, "tokens generated at each depth");
    model->add_option("-t,--threads", model_options.threads)->delimiter(',');
    model->add_option("--peers", model_options.peers, "llama.cpp's cache types, or none")
        ->delimiter(',');
    model->add_option("--rounds", model_options.rounds, "measurements of each, in turn");
    cli::add_plugin_option(*model, model_options.plugin_path);
    cli::add_setting_options(*model, model_options.settings);
    model->get_option("--model")->required();
  }

  Status run_model() {
    std::erase(model_options.peers, "none");
    if (!model_shape_name.empty()) {
      const Expected<ModelShape> shape = model_shape(model_shape_name);
      if (!shape) {
        return shape.error();
      }
      constexpr std::uint64_t kSeed = 1;
      if (Status written = write_random_model(*shape, kSeed, model_options.model_path); !written) {
        return written;
      }
    }
    return bench_model(model_options, records());
  }

  Records records() const { return {json_path, run_meta(command_line)}; }
};

BenchCommand::BenchCommand(CLI::App& command, std::string command_line)
    : impl_(std::make_unique<Impl>()) {
  impl_->command_line = std::move(command_line);
  command.require_subcommand(1);
  command.fallthrough();
  command.add_option("--json", impl_->json_path, "append the measurements, one JSON object a line")
      ->type_name("FILE");
  impl_->add_op(command);
  impl_->add_kernels(command);
  impl_->add_model(command);
}

BenchCommand::~BenchCommand() = default;

Status BenchCommand::run() {
  if (impl_->kernels->parsed()) {
    return bench_kernels(impl_->kernel_options, impl_->records());
  }
  return impl_->op->parsed() ? impl_->run_op() : impl_->run_model();
}

}  // namespace zipcache::bench
