// What the channels of a model's keys, values and queries were seen to be while it read some text:
// for policies that use such figures instead of measuring every sequence anew. `zipcache calibrate`
// makes one; the text form is a file's whole content.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/expected.h"

namespace zipcache::policy {

inline constexpr int kCalibrationVersion = 1;

// Keys and queries are those that attention sees, rotary embedding applied.
struct LayerCalibration {
  std::uint32_t layer = 0;
  std::uint32_t n_kv_heads = 0;
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
  std::vector<float> key_min, key_max;      // [n_kv_heads, key_dim]
  std::vector<float> query_max;             // the same: max |q| of the query heads of a KV head
  std::vector<float> value_min, value_max;  // [n_kv_heads, value_dim]

  bool operator==(const LayerCalibration&) const = default;
};

struct Calibration {
  // Where it comes from, for people; nothing is decided by them.
  std::string model;              // file name
  std::string model_fingerprint;  // size and hash of the file
  std::string text;               // file name
  std::uint64_t n_tokens = 0;
  std::vector<LayerCalibration> layers;  // ascending

  bool operator==(const Calibration&) const = default;
};

// One layer whose channels are all alike, for where only sizes count.
Calibration flat_calibration(std::uint32_t n_kv_heads, std::uint32_t key_dim,
                             std::uint32_t value_dim);

// JSON: {"format", "version", "model", "model_fingerprint", "text", "n_tokens", "layers":
// [{"layer", "n_kv_heads", "key_dim", "value_dim", "key_min", "key_max", "query_max", "value_min",
// "value_max"}]}. Floats read back as they were. REQUIRES: figures of up to 65504, as fp16 has.
std::string calibration_text(const Calibration& calibration);

// kCorrupt or kUnsupported, in one line, for anything but what calibration_text() makes: other
// versions, missing or additional figures, dimensions that no cache has, minima above maxima.
Expected<Calibration> parse_calibration(std::string_view text);

}  // namespace zipcache::policy
