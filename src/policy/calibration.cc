#include "policy/calibration.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "policy/settings.h"

namespace zipcache::policy {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kFormat = "zipcache calibration";
constexpr std::uint32_t kMaxHeads = 4096, kMaxHeadDim = 512;
constexpr double kLargestHalf = 65504;  // what a cache can hold

// A figure of a layer, of which there is one for each channel.
struct Figure {
  const char* name;
  std::vector<float> LayerCalibration::*values;
  bool is_of_values;
};
constexpr Figure kFigures[] = {
    {"key_min", &LayerCalibration::key_min, false},
    {"key_max", &LayerCalibration::key_max, false},
    {"query_max", &LayerCalibration::query_max, false},
    {"value_min", &LayerCalibration::value_min, true},
    {"value_max", &LayerCalibration::value_max, true},
};

std::size_t n_channels(const LayerCalibration& layer, const Figure& figure) {
  return std::size_t{layer.n_kv_heads} * (figure.is_of_values ? layer.value_dim : layer.key_dim);
}

// The double with the fewest digits that reads back as this float.
double short_double(float value) { return std::stod(float_text(value)); }

Error malformed(const std::string& what) {
  return corrupt("found " + what + "; make it anew: zipcache calibrate -m MODEL -o FILE");
}

// Throws nlohmann's exceptions for what is missing or no whole number of this type.
template <typename Count = std::uint32_t>
Count count_of(const Json& object, const char* name) {
  const Json& number = object.at(name);
  if (!number.is_number_unsigned() ||
      number.get<std::uint64_t>() > std::numeric_limits<Count>::max()) {
    throw Json::type_error::create(302, std::string(name) + " is no count", &object);
  }
  return number.get<Count>();
}

Expected<LayerCalibration> parse_layer(const Json& json) {
  LayerCalibration layer;
  layer.layer = count_of(json, "layer");
  layer.n_kv_heads = count_of(json, "n_kv_heads");
  layer.key_dim = count_of(json, "key_dim");
  layer.value_dim = count_of(json, "value_dim");
  const std::string name = "layer " + std::to_string(layer.layer);
  for (const std::uint32_t dim : {layer.key_dim, layer.value_dim}) {
    if (layer.n_kv_heads == 0 || layer.n_kv_heads > kMaxHeads || dim == 0 || dim % 16 != 0 ||
        dim > kMaxHeadDim) {
      return malformed(name + " with " + std::to_string(layer.n_kv_heads) + " KV heads of " +
                       std::to_string(dim) + " channels");
    }
  }
  for (const Figure& figure : kFigures) {
    std::vector<float>& values = layer.*figure.values;
    for (const Json& value : json.at(figure.name)) {
      const double number = value.get<double>();
      if (!(std::abs(number) <= kLargestHalf)) {
        return malformed(name + " with " + value.dump() + " in " + figure.name +
                         ", which exceeds fp16");
      }
      values.push_back(static_cast<float>(number));
    }
    if (values.size() != n_channels(layer, figure)) {
      return malformed(name + " with " + std::to_string(values.size()) + " figures in " +
                       figure.name + " instead of " + std::to_string(n_channels(layer, figure)));
    }
  }
  const auto exceeds = [](const std::vector<float>& low, const std::vector<float>& high) {
    return !std::equal(low.begin(), low.end(), high.begin(), std::less_equal<>());
  };
  if (exceeds(layer.key_min, layer.key_max) || exceeds(layer.value_min, layer.value_max) ||
      std::any_of(layer.query_max.begin(), layer.query_max.end(), [](float q) { return q < 0; })) {
    return malformed(name + " with a minimum above its maximum");
  }
  return layer;
}

Expected<Calibration> parse(const Json& json) {
  if (!json.is_object() || !json.contains("format") || json["format"] != kFormat) {
    return malformed("no calibration of zipcache");
  }
  if (json.at("version") != kCalibrationVersion) {
    return unsupported("found version " + json.at("version").dump() + ", supported is " +
                       std::to_string(kCalibrationVersion) +
                       "; make it anew: zipcache calibrate -m MODEL -o FILE");
  }
  Calibration calibration{.model = json.at("model"),
                          .model_fingerprint = json.at("model_fingerprint"),
                          .text = json.at("text"),
                          .n_tokens = count_of<std::uint64_t>(json, "n_tokens"),
                          .layers = {}};
  for (const Json& layer : json.at("layers")) {
    Expected<LayerCalibration> parsed = parse_layer(layer);
    if (!parsed) {
      return parsed.error();
    }
    if (!calibration.layers.empty() && calibration.layers.back().layer >= parsed->layer) {
      return malformed("layer " + std::to_string(parsed->layer) + " after layer " +
                       std::to_string(calibration.layers.back().layer));
    }
    calibration.layers.push_back(std::move(*parsed));
  }
  if (calibration.layers.empty()) {
    return malformed("no layers");
  }
  return calibration;
}

}  // namespace

Calibration flat_calibration(std::uint32_t n_kv_heads, std::uint32_t key_dim,
                             std::uint32_t value_dim) {
  LayerCalibration layer{.layer = 0,
                         .n_kv_heads = n_kv_heads,
                         .key_dim = key_dim,
                         .value_dim = value_dim,
                         .key_min = {},
                         .key_max = {},
                         .query_max = {},
                         .value_min = {},
                         .value_max = {}};
  for (const Figure& figure : kFigures) {
    const bool is_min = std::string_view(figure.name).ends_with("_min");
    (layer.*figure.values).assign(n_channels(layer, figure), is_min ? -1.0f : 1.0f);
  }
  Calibration calibration;
  calibration.layers.push_back(std::move(layer));
  return calibration;
}

std::string calibration_text(const Calibration& calibration) {
  Json json = {{"format", kFormat},          {"version", kCalibrationVersion},
               {"model", calibration.model}, {"model_fingerprint", calibration.model_fingerprint},
               {"text", calibration.text},   {"n_tokens", calibration.n_tokens},
               {"layers", Json::array()}};
  for (const LayerCalibration& layer : calibration.layers) {
    Json entry = {{"layer", layer.layer},
                  {"n_kv_heads", layer.n_kv_heads},
                  {"key_dim", layer.key_dim},
                  {"value_dim", layer.value_dim}};
    for (const Figure& figure : kFigures) {
      Json values = Json::array();
      for (const float value : layer.*figure.values) {
        values.push_back(short_double(value));
      }
      entry[figure.name] = std::move(values);
    }
    json["layers"].push_back(std::move(entry));
  }
  return json.dump() + "\n";
}

Expected<Calibration> parse_calibration(std::string_view text) {
  try {
    return parse(Json::parse(text));
  } catch (const Json::exception& error) {
    return malformed(std::string("no calibration of zipcache (") + error.what() + ")");
  }
}

}  // namespace zipcache::policy
