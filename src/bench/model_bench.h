// `zipcache bench model`: tokens per second of a whole model by depth, with the columns of
// llama-bench, for the plug-in and for llama.cpp's own cache types in turn in the same process.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/expected.h"
#include "bench/record.h"

namespace zipcache::bench {

struct ModelOptions {
  std::string model_path;
  std::vector<std::uint32_t> depths{256, 1024,
                                    4096};  // tokens in the cache before each measurement
  std::uint32_t n_prompt = 128;             // tokens read at once
  std::uint32_t n_generate = 16;            // tokens generated one by one
  std::vector<std::uint32_t> threads{2};
  std::vector<std::string> peers{"f16", "q8_0", "q4_0"};
  std::uint32_t rounds = 3;
  std::string plugin_path;
  std::map<std::string, std::string> settings;
};

// Prints a row per point and adds a record as it is measured.
Status bench_model(const ModelOptions& options, const Records& records);

}  // namespace zipcache::bench
