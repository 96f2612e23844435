#include "eval/sample.h"

#include <algorithm>

namespace zipcache::eval {
namespace {

std::vector<float> column(const std::vector<PositionResult>& positions,
                          float PositionResult::*member) {
  std::vector<float> values;
  for (const PositionResult& position : positions) {
    values.push_back(position.*member);
  }
  return values;
}

// Positions as columns: {"nll": [...], ...}; same_top as a text of 0 and 1.
nlohmann::ordered_json positions_to_json(const std::vector<PositionResult>& positions) {
  std::string same_top;
  for (const PositionResult& position : positions) {
    same_top += position.same_top ? '1' : '0';
  }
  return {{"nll", column(positions, &PositionResult::nll)},
          {"nll_base", column(positions, &PositionResult::nll_base)},
          {"kld", column(positions, &PositionResult::kld)},
          {"p_diff", column(positions, &PositionResult::p_diff)},
          {"same_top", same_top}};
}

std::vector<PositionResult> parse_positions(const nlohmann::json& json) {
  const std::string same_top = json.at("same_top");
  std::vector<PositionResult> positions(same_top.size());
  const auto fill = [&](const char* name, float PositionResult::*member) {
    const nlohmann::json& values = json.at(name);
    for (std::size_t i = 0; i < positions.size(); ++i) {
      positions[i].*member = values.at(i).get<float>();
    }
  };
  fill("nll", &PositionResult::nll);
  fill("nll_base", &PositionResult::nll_base);
  fill("kld", &PositionResult::kld);
  fill("p_diff", &PositionResult::p_diff);
  for (std::size_t i = 0; i < positions.size(); ++i) {
    positions[i].same_top = same_top[i] == '1';
  }
  return positions;
}

}  // namespace

nlohmann::ordered_json to_json(const cache::ByteCount& bytes) {
  return {{"codes", bytes.codes},     {"params", bytes.params}, {"masks", bytes.masks},
          {"staging", bytes.staging}, {"slack", bytes.slack},   {"total", bytes.total()}};
}

nlohmann::ordered_json to_json(const Sample& sample) {
  nlohmann::ordered_json json = {
      {"policy", sample.policy},        {"item", sample.item},
      {"n_tokens", sample.n_tokens},    {"cpu_seconds", sample.cpu_seconds},
      {"bytes", to_json(sample.bytes)}, {"fp16_bytes", sample.bytes.fp16}};
  if (!sample.positions.empty()) {
    json["positions"] = positions_to_json(sample.positions);
  } else {
    json["text"] = sample.answer.text;
    json["tokens"] = sample.answer.tokens;
  }
  return json;
}

Expected<Sample> parse_sample(const nlohmann::json& json) {
  try {
    Sample sample;
    sample.policy = json.at("policy");
    sample.item = json.at("item");
    sample.n_tokens = json.at("n_tokens");
    sample.cpu_seconds = json.at("cpu_seconds");
    const auto& bytes = json.at("bytes");
    sample.bytes.codes = bytes.at("codes");
    sample.bytes.params = bytes.at("params");
    sample.bytes.masks = bytes.at("masks");
    sample.bytes.staging = bytes.at("staging");
    sample.bytes.slack = bytes.at("slack");
    sample.bytes.fp16 = json.at("fp16_bytes");
    if (json.contains("positions")) {
      sample.positions = parse_positions(json.at("positions"));
    } else {
      sample.answer.text = json.at("text");
      sample.answer.tokens = json.at("tokens").get<std::vector<std::int32_t>>();
    }
    return sample;
  } catch (const nlohmann::json::exception& error) {
    return corrupt(std::string("not a sample: ") + error.what());
  }
}

}  // namespace zipcache::eval
