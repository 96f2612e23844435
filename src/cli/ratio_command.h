// `zipcache ratio`: how much smaller a cache is, for any shape, length and policy, as the paper
// reckons and as counted in bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/expected.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11's name
class App;
}

namespace zipcache::cli {

struct RatioOptions {
  std::vector<std::string> policies{"default"};
  std::string model_path;  // "" = the shape below
  std::uint32_t n_layers = 32;
  std::uint32_t n_kv_heads = 8;
  std::uint32_t head_dim = 128;
  std::uint32_t value_dim = 0;  // 0 = head_dim
  std::vector<std::uint32_t> lengths{128, 256, 512, 840, 1024, 2048, 4096, 8192};
  std::uint32_t tokens_per_step = 512;
  std::uint32_t prompt_tokens = UINT32_MAX;
  std::string json_path;
};

void add_ratio_options(CLI::App& command, RatioOptions& options);

Status print_ratios(const RatioOptions& options);

}  // namespace zipcache::cli
