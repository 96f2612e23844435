#include "cli/ratio_command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "cli/gguf_shape.h"
#include "cli/host_log.h"
#include "eval/paper_ratio.h"
#include "eval/policy_spec.h"
#include "eval/sample.h"
#include "policy/policy.h"

namespace zipcache::cli {
namespace {

using Json = nlohmann::ordered_json;

// The three ratios of one policy at one length.
struct Row {
  std::uint32_t n_tokens = 0;
  double reported = 0;
  double formula = 0;
  cache::ByteCount bytes;  // of all layers
};

struct PolicyRows {
  std::string name;
  std::string description;
  double code_bits = 0;
  std::vector<Row> rows;
};

// One for each group of layers.
using Policies = std::vector<std::shared_ptr<const policy::Policy>>;

// Sizes depend on shapes alone, so in place of a calibration one stands that says nothing.
Expected<Policies> make_policies(const eval::PolicySpec& spec,
                                 const std::vector<LayerGroup>& shape) {
  Policies policies;
  for (const LayerGroup& group : shape) {
    const policy::Calibration flat =
        policy::flat_calibration(group.dims.n_kv_heads, group.dims.key_dim, group.dims.value_dim);
    Expected<policy::Policy> made = policy::make_policy(spec.settings, &flat);
    if (!made) {
      return made.error();
    }
    policies.push_back(std::make_shared<const policy::Policy>(std::move(*made)));
  }
  return policies;
}

Expected<Row> make_row(const Policies& policies, const std::vector<LayerGroup>& shape,
                       std::uint32_t n_tokens, const RatioOptions& options) {
  const policy::Policy& policy = *policies.front();
  const double bits = eval::mean_code_bits(policy);
  Row row{.n_tokens = n_tokens, .reported = eval::reported_ratio(n_tokens, bits), .bytes = {}};
  double fp16 = 0, counted = 0;  // by formula
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const LayerGroup& group = shape[i];
    const auto& dims = group.dims;
    // The formula knows one dimension; where K and V differ, their mean holds as many elements.
    const double channels = dims.n_kv_heads * (dims.key_dim + dims.value_dim) / 2.0;
    const double elements = 2.0 * group.n_layers * channels * n_tokens;
    fp16 += elements;
    counted += elements / eval::formula_ratio({1, channels, double(n_tokens)}, bits,
                                              eval::formula_params(policy));
    const Expected<cache::ByteCount> layer = eval::layer_bytes(
        policies[i], dims, n_tokens, options.tokens_per_step, options.prompt_tokens);
    if (!layer) {
      return layer.error();
    }
    for (std::uint32_t n = 0; n < group.n_layers; ++n) {
      row.bytes += *layer;
    }
  }
  row.formula = fp16 / counted;
  if (!policy.seals()) {
    row.reported = 1;
  }
  return row;
}

Expected<PolicyRows> make_rows(const std::string& name, const std::vector<LayerGroup>& shape,
                               const RatioOptions& options) {
  const Expected<eval::PolicySpec> spec = eval::parse_policy(name);
  if (!spec) {
    return spec.error();
  }
  if (spec->is_host()) {
    return invalid_argument("policy '" + name +
                            "' is llama.cpp's own: its ratio is that of the type; ratio takes "
                            "settings of this cache (policy=fp16, key-bits=4, ...)");
  }
  Expected<Policies> policies = make_policies(*spec, shape);
  if (!policies) {
    return invalid_argument("policy '" + name + "': " + policies.error().message);
  }
  const policy::Policy& policy = *policies->front();
  PolicyRows rows{.name = name,
                  .description = policy::describe(policy),
                  .code_bits = eval::mean_code_bits(policy),
                  .rows = {}};
  for (const std::uint32_t n_tokens : options.lengths) {
    Expected<Row> row = make_row(*policies, shape, n_tokens, options);
    if (!row) {
      return row.error();
    }
    rows.rows.push_back(*row);
  }
  return rows;
}

struct PaperFigure {
  const char* what;
  double ratio;
};

std::vector<PaperFigure> paper_figures() {
  const eval::RatioShape shape{.batch = 8, .channels = 4096, .tokens = 4096};
  return {{"groupwise 32, 4 bits", eval::formula_ratio(shape, 4, eval::groupwise(32))},
          {"tokenwise, 4 bits", eval::formula_ratio(shape, 4, eval::kTokenwise)},
          {"channelwise K + tokenwise V, 4 bits",
           eval::formula_ratio(shape, 4, eval::kChannelwiseTokenwise)},
          {"channelwise K + channel-separable V, 4 bits",
           eval::formula_ratio(shape, 4, eval::kChannelwiseCst)},
          {"4/2 bits, 60 % salient, 840 tokens", eval::reported_ratio(840, 3.2)},
          {"4/2 bits, 60 % salient, 120 tokens", eval::reported_ratio(120, 3.2)},
          {"4/2 bits, 80 % salient, 120 tokens", eval::reported_ratio(120, 3.6)},
          {"4/2 bits, 80 % salient, 3072 tokens", eval::reported_ratio(3072, 3.6)}};
}

void print_tables(const std::vector<LayerGroup>& shape, const std::vector<PolicyRows>& policies,
                  const RatioOptions& options) {
  fmt::print("The paper's figures (batch 8, 4096 channels; the first four at 4096 tokens)\n");
  for (const PaperFigure& figure : paper_figures()) {
    fmt::print("  {:<44} {:.3f}\n", figure.what, figure.ratio);
  }
  for (const LayerGroup& group : shape) {
    fmt::print("\n{} layers of {} KV heads, {} (K) and {} (V) channels each", group.n_layers,
               group.dims.n_kv_heads, group.dims.key_dim, group.dims.value_dim);
  }
  fmt::print("; tokens come {} at once", options.tokens_per_step);
  if (options.prompt_tokens != UINT32_MAX) {
    fmt::print(", those beyond {} one by one", options.prompt_tokens);
  }
  fmt::print("\n");
  for (const PolicyRows& policy : policies) {
    fmt::print("\n{}: {}\n", policy.name, policy.description);
    fmt::print("  {:>8} {:>8} {:>8} {:>9} {:>7}   {}\n", "tokens", "paper", "formula", "counted",
               "bits", "bytes: codes + params + masks + staging + slack = all");
    for (const Row& row : policy.rows) {
      const cache::ByteCount& b = row.bytes;
      fmt::print("  {:>8} {:>8.3f} {:>8.3f} {:>9.3f} {:>7.3f}   {} + {} + {} + {} + {} = {}\n",
                 row.n_tokens, row.reported, row.formula, b.ratio(), b.bits_per_element(), b.codes,
                 b.params, b.masks, b.staging, b.slack, b.total());
    }
  }
  fmt::print(
      "\npaper: the convention behind the ratios that the paper prints (batch 8, 4096 channels)\n"
      "formula: the paper's, with these dimensions and one sequence; codes and parameters only\n"
      "counted: FP16 bytes of the tokens over all bytes that the cache holds\n");
}

Json to_json(const std::vector<LayerGroup>& shape, const std::vector<PolicyRows>& policies,
             const RatioOptions& options) {
  Json json = {{"paper", Json::array()}, {"layers", Json::array()}, {"rows", Json::array()}};
  json["tokens_per_step"] = options.tokens_per_step;
  if (options.prompt_tokens != UINT32_MAX) {
    json["prompt_tokens"] = options.prompt_tokens;
  }
  for (const PaperFigure& figure : paper_figures()) {
    json["paper"].push_back({{"what", figure.what}, {"ratio", figure.ratio}});
  }
  for (const LayerGroup& group : shape) {
    json["layers"].push_back({{"n_layers", group.n_layers},
                              {"n_kv_heads", group.dims.n_kv_heads},
                              {"key_dim", group.dims.key_dim},
                              {"value_dim", group.dims.value_dim}});
  }
  for (const PolicyRows& policy : policies) {
    for (const Row& row : policy.rows) {
      const cache::ByteCount& b = row.bytes;
      json["rows"].push_back({{"policy", policy.name},
                              {"n_tokens", row.n_tokens},
                              {"code_bits", policy.code_bits},
                              {"ratio_paper", row.reported},
                              {"ratio_formula", row.formula},
                              {"ratio", b.ratio()},
                              {"bits_per_element", b.bits_per_element()},
                              {"bytes", eval::to_json(b)},
                              {"fp16_bytes", b.fp16}});
    }
  }
  return json;
}

}  // namespace

void add_ratio_options(CLI::App& command, RatioOptions& options) {
  constexpr std::uint32_t kMaxTokens = 1u << 20, kMaxLayers = 1024, kMaxHeads = 1024;
  const auto count = [](std::uint32_t max) { return CLI::Range(1u, max).description(""); };
  command
      .add_option("policies", options.policies,
                  "settings of the cache: name=value,... or default (default: default)")
      ->type_name("POLICY");
  command.add_option("-m,--model", options.model_path, "take the shape from a GGUF file")
      ->type_name("FILE");
  command.add_option("--layers", options.n_layers, "default 32")
      ->type_name("N")
      ->check(count(kMaxLayers));
  command.add_option("--kv-heads", options.n_kv_heads, "default 8")
      ->type_name("N")
      ->check(count(kMaxHeads));
  command.add_option("--head-dim", options.head_dim, "channels of a head (default 128)")
      ->type_name("N")
      ->check(count(kMaxHeads));
  command.add_option("--value-dim", options.value_dim, "of V, where it differs")->type_name("N");
  command
      .add_option("--tokens", options.lengths,
                  "lengths, comma-separated (default 128,256,512,840,1024,2048,4096,8192)")
      ->type_name("N")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(count(kMaxTokens));
  command
      .add_option("--ubatch-size", options.tokens_per_step,
                  "tokens that come at once, also as -ub (default 512; 1 = as in generation)")
      ->type_name("N")
      ->check(count(kMaxTokens));
  command
      .add_option("--prompt", options.prompt_tokens,
                  "tokens of the prompt; those beyond come one by one, as in generation")
      ->type_name("N")
      ->check(count(kMaxTokens));
  command.add_option("--json", options.json_path, "write the numbers as JSON")->type_name("FILE");
}

Status print_ratios(const RatioOptions& options) {
  install_host_log(/*verbose=*/false);
  std::vector<LayerGroup> shape = {{{options.n_kv_heads, options.head_dim,
                                     options.value_dim == 0 ? options.head_dim : options.value_dim},
                                    options.n_layers}};
  if (!options.model_path.empty()) {
    Expected<std::vector<LayerGroup>> read = read_gguf_shape(options.model_path);
    if (!read) {
      return read.error();
    }
    shape = std::move(*read);
  }
  std::vector<PolicyRows> policies;
  for (const std::string& name : options.policies) {
    Expected<PolicyRows> rows = make_rows(name, shape, options);
    if (!rows) {
      return rows.error();
    }
    policies.push_back(std::move(*rows));
  }
  if (!options.json_path.empty()) {
    std::ofstream file(options.json_path);
    file << to_json(shape, policies, options).dump(2) << '\n';
    if (!file.flush()) {
      return invalid_argument("can't write " + options.json_path);
    }
  }
  print_tables(shape, policies, options);
  return ok_status();
}

}  // namespace zipcache::cli
