// What one policy made of one item: a window of a text or a prompt. Results are computed from
// samples alone, so an interrupted run goes on where it stopped.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/expected.h"
#include "cache/bytes.h"
#include "eval/divergence.h"
#include "eval/task.h"

namespace zipcache::eval {

struct Sample {
  std::string policy;
  std::string item;
  std::size_t n_tokens = 0;  // in the cache at the end
  double cpu_seconds = 0;    // of all threads, for reading and answering
  cache::ByteCount bytes{};  // at the end; of llama.cpp's own caches only the total is known
  std::vector<PositionResult> positions{};  // of a window
  Answer answer{};                          // to a prompt
};

nlohmann::ordered_json to_json(const Sample& sample);
Expected<Sample> parse_sample(const nlohmann::json& json);

nlohmann::ordered_json to_json(const cache::ByteCount& bytes);

}  // namespace zipcache::eval
