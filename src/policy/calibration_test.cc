#include "policy/calibration.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

namespace zipcache::policy {
namespace {

using Json = nlohmann::ordered_json;

Calibration example() {
  Calibration calibration{.model = "m.gguf",
                          .model_fingerprint = "12:34",
                          .text = "t.txt",
                          .n_tokens = 1ull << 40,
                          .layers = {}};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const std::uint32_t number : {0u, 2u, 7u}) {
    LayerCalibration layer{.layer = number,
                           .n_kv_heads = 2,
                           .key_dim = 32,
                           .value_dim = 16,
                           .key_min = {},
                           .key_max = {},
                           .query_max = {},
                           .value_min = {},
                           .value_max = {}};
    for (int c = 0; c < 64; ++c) {
      layer.key_min.push_back(-std::abs(normal(random)));
      layer.key_max.push_back(std::abs(normal(random)));
      layer.query_max.push_back(std::abs(normal(random)));
    }
    layer.value_min.assign(32, -65504.0f);
    layer.value_max.assign(32, std::numeric_limits<float>::denorm_min());
    layer.value_max[3] = 0.1f;
    calibration.layers.push_back(layer);
  }
  return calibration;
}

TEST(Calibration, ReadsBackAsItWas) {
  const Calibration written = example();
  const auto read = parse_calibration(calibration_text(written));
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(*read, written);
  EXPECT_NE(calibration_text(written).find(",0.1,"), std::string::npos);  // not 0.10000000149
}

TEST(Calibration, FlatIsOneLayerThatIsAlikeEverywhere) {
  const Calibration flat = flat_calibration(3, 64, 128);
  ASSERT_EQ(flat.layers.size(), 1u);
  EXPECT_EQ(flat.layers[0].query_max, std::vector<float>(192, 1.0f));
  EXPECT_EQ(flat.layers[0].value_min, std::vector<float>(384, -1.0f));
  const auto read = parse_calibration(calibration_text(flat));
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(*read, flat);
}

// The error of the example's text after a change of its JSON.
template <typename Change>
std::string error_after(Change&& change, ErrorCode code = ErrorCode::kCorrupt) {
  Json json = Json::parse(calibration_text(example()));
  change(json);
  const auto read = parse_calibration(json.dump());
  if (read) {
    return "no error";
  }
  EXPECT_EQ(read.error().code, code);
  EXPECT_EQ(read.error().message.find('\n'), std::string::npos) << read.error().message;
  EXPECT_NE(read.error().message.find("zipcache calibrate -m MODEL -o FILE"), std::string::npos);
  return read.error().message;
}

TEST(CalibrationErrors, OtherVersions) {
  EXPECT_EQ(error_after([](Json& j) { j["version"] = 2; }, ErrorCode::kUnsupported),
            "found version 2, supported is 1; make it anew: zipcache calibrate -m MODEL -o FILE");
  EXPECT_NE(error_after([](Json& j) { j["version"] = "one"; }, ErrorCode::kUnsupported)
                .find("found version \"one\""),
            std::string::npos);
}

TEST(CalibrationErrors, OtherContents) {
  for (const char* text :
       {"", "{", "[]", "null", "3", "{}", "{\"format\": \"other\"}", "\xff\xfe"}) {
    const auto read = parse_calibration(text);
    ASSERT_FALSE(read) << text;
    EXPECT_NE(read.error().message.find("found no calibration of zipcache"), std::string::npos)
        << read.error().message;
    EXPECT_EQ(read.error().message.find('\n'), std::string::npos) << read.error().message;
  }
}

TEST(CalibrationErrors, MissingParts) {
  for (const char* name : {"version", "model", "model_fingerprint", "text", "n_tokens", "layers"}) {
    EXPECT_NE(error_after([&](Json& j) { j.erase(name); }).find(name), std::string::npos);
    EXPECT_NE(error_after(
                  [&](Json& j) {
                    j[name] = Json::object({{"a", 1}});
                  },
                  name == std::string("version") ? ErrorCode::kUnsupported : ErrorCode::kCorrupt),
              "no error")
        << name;
  }
  for (const char* name : {"layer", "n_kv_heads", "key_dim", "value_dim", "key_min", "key_max",
                           "query_max", "value_min", "value_max"}) {
    EXPECT_NE(error_after([&](Json& j) { j["layers"][1].erase(name); }).find(name),
              std::string::npos);
    EXPECT_NE(error_after([&](Json& j) { j["layers"][1][name] = "x"; }), "no error") << name;
  }
}

TEST(CalibrationErrors, CountsThatAreNone) {
  for (const Json& bad : {Json(1.5), Json(-1), Json(1e87), Json("7"), Json(nullptr)}) {
    for (const char* name : {"layer", "n_kv_heads", "key_dim", "value_dim"}) {
      EXPECT_NE(error_after([&](Json& j) { j["layers"][1][name] = bad; }).find(name),
                std::string::npos)
          << name << bad;
    }
    EXPECT_NE(error_after([&](Json& j) { j["n_tokens"] = bad; }).find("n_tokens"),
              std::string::npos)
        << bad;
  }
  EXPECT_NE(error_after([](Json& j) { j["layers"][1]["layer"] = 1ull << 32; }).find("layer"),
            std::string::npos);
}

TEST(CalibrationErrors, Layers) {
  EXPECT_NE(error_after([](Json& j) { j["layers"] = Json::array(); }).find("found no layers"),
            std::string::npos);
  EXPECT_NE(error_after([](Json& j) { j["layers"][1]["layer"] = 0; }).find("layer 0 after layer 0"),
            std::string::npos);
  EXPECT_NE(error_after([](Json& j) { j["layers"][0]["layer"] = 5; }).find("layer 2 after layer 5"),
            std::string::npos);
  for (const Json& bad : {Json(-1), Json(1.5), Json(1ull << 32), Json("0"), Json()}) {
    EXPECT_NE(error_after([&](Json& j) { j["layers"][0]["layer"] = bad; }).find("no count"),
              std::string::npos)
        << bad;
  }
  for (const Json& bad : {Json(0), Json(24), Json(528), Json(4000000000u)}) {
    EXPECT_NE(error_after([&](Json& j) { j["layers"][0]["key_dim"] = bad; }).find("KV heads of"),
              std::string::npos)
        << bad;
  }
  for (const Json& bad : {Json(0), Json(4097)}) {
    EXPECT_NE(error_after([&](Json& j) { j["layers"][0]["n_kv_heads"] = bad; }).find("KV heads"),
              std::string::npos);
  }
}

TEST(CalibrationErrors, Figures) {
  EXPECT_NE(error_after([](Json& j) {
              j["layers"][2]["key_max"].push_back(1);
            }).find("layer 7 with 65 figures in key_max instead of 64"),
            std::string::npos);
  EXPECT_NE(error_after([](Json& j) {
              j["layers"][2]["value_max"].erase(0);
            }).find("31 figures in value_max instead of 32"),
            std::string::npos);
  for (const Json& bad : {Json(65505), Json(1e300), Json(-1e39), Json("1"), Json()}) {
    EXPECT_NE(error_after([&](Json& j) { j["layers"][0]["query_max"][3] = bad; }), "no error")
        << bad;
  }
  for (const char* name : {"key_min", "value_min"}) {
    EXPECT_NE(error_after([&](Json& j) {
                j["layers"][0][name][5] = 6e4;
              }).find("a minimum above its maximum"),
              std::string::npos);
  }
  EXPECT_NE(error_after([](Json& j) {
              j["layers"][0]["query_max"][0] = -1;
            }).find("a minimum above its maximum"),
            std::string::npos);
  // Infinity is no number of JSON, and too large a one none of a double.
  std::string text = calibration_text(flat_calibration(1, 16, 16));
  text.replace(text.find("1.0"), 3, "1e999");
  EXPECT_FALSE(parse_calibration(text));
}

}  // namespace
}  // namespace zipcache::policy
