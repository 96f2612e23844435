// The calculator: the paper's figures, and bytes against a cache that attention really filled.
#include <gtest/gtest.h>

#include <cmath>

#include "cache/test_engine.h"
#include "eval/layer_bytes.h"
#include "eval/paper_ratio.h"
#include "kernels/kernels.h"

namespace zipcache::eval {
namespace {

double rounded(double value, int decimals) {
  const double scale = std::pow(10.0, decimals);
  return std::round(value * scale) / scale;
}

TEST(PaperRatio, FourBitsAtBatch8) {
  const RatioShape shape{.batch = 8, .channels = 4096, .tokens = 4096};
  EXPECT_DOUBLE_EQ(formula_ratio(shape, 4, groupwise(32)), 3.2);
  EXPECT_EQ(rounded(formula_ratio(shape, 4, kTokenwise), 4), 3.9922);
  EXPECT_EQ(rounded(formula_ratio(shape, 4, kChannelwiseTokenwise), 4), 3.9956);
  EXPECT_EQ(rounded(formula_ratio(shape, 4, kChannelwiseCst), 4), 3.9954);
}

TEST(PaperRatio, PrintedFigures) {
  const auto bits = [](double salient) { return 4 * salient + 2 * (1 - salient); };
  EXPECT_EQ(rounded(reported_ratio(840, bits(0.6)), 2), 4.98);
  EXPECT_EQ(rounded(reported_ratio(120, bits(0.6)), 2), 4.94);
  EXPECT_EQ(rounded(reported_ratio(120, bits(0.8)), 2), 4.39);
  EXPECT_EQ(rounded(reported_ratio(3072, bits(0.8)), 2), 4.43);
  EXPECT_EQ(rounded(reported_ratio(840, bits(0.7)), 2), 4.69);
}

TEST(PaperRatio, TrueDimensions) {
  const RatioShape shape{.batch = 1, .channels = 1024, .tokens = 840};
  EXPECT_EQ(rounded(formula_ratio(shape, 3.2, kChannelwiseCst), 3), 4.932);
  EXPECT_EQ(rounded(formula_ratio(shape, 3.2, {.per_channel = 5, .per_token = 2}), 3), 4.903);
}

TEST(PaperRatio, MeanCodeBitsOfPolicies) {
  const auto bits = [](const std::map<std::string, std::string>& settings) {
    return mean_code_bits(policy::make_policy(settings).value());
  };
  EXPECT_DOUBLE_EQ(bits({{"mode", "paper"}}), 3.2);
  EXPECT_DOUBLE_EQ(bits({{"policy", "uniform"}, {"key-bits", "4"}, {"value-bits", "2"}}), 3);
  EXPECT_DOUBLE_EQ(bits({{"policy", "fp16"}}), 16);
}

TEST(PaperRatio, ParametersOfPolicies) {
  const auto ratio = [](const std::map<std::string, std::string>& settings) {
    const policy::Policy policy = policy::make_policy(settings).value();
    return formula_ratio({1, 1024, 840}, mean_code_bits(policy), formula_params(policy));
  };
  EXPECT_EQ(rounded(ratio({{"mode", "paper"}}), 3), 4.932);
  EXPECT_DOUBLE_EQ(ratio({{"policy", "fp16"}}), 1);
  EXPECT_DOUBLE_EQ(ratio({{"policy", "uniform"}, {"granularity", "groupwise"}}), 3.2);
  EXPECT_DOUBLE_EQ(ratio({{"policy", "kivi"}}), 16.0 / 3);  // 2 + 32 / G bits
}

struct BytesCase {
  std::map<std::string, std::string> settings;
  std::uint32_t tokens_per_step;
};

class LayerBytes : public testing::TestWithParam<BytesCase> {};

void expect_same(const cache::ByteCount& found, const cache::ByteCount& expected) {
  EXPECT_EQ(found.codes, expected.codes);
  EXPECT_EQ(found.params, expected.params);
  EXPECT_EQ(found.masks, expected.masks);
  EXPECT_EQ(found.staging, expected.staging);
  EXPECT_EQ(found.slack, expected.slack);
  EXPECT_EQ(found.fp16, expected.fp16);
  EXPECT_EQ(found.sealed_tokens, expected.sealed_tokens);
}

TEST_P(LayerBytes, AreThoseOfACacheInUse) {
  const auto& [settings, step] = GetParam();
  const cache::TestDims dims{
      .n_kv_heads = 2, .group = 1, .key_dim = 32, .value_dim = 32, .n_cells = 700};
  cache::TestEngine engine(dims, settings, kernels::select_kernels("").value(), 1, 1);
  const auto policy = std::make_shared<policy::Policy>(policy::make_policy(settings).value());
  std::uint32_t n = 0;
  for (const std::uint32_t length : {1u, 31u, 32u, 33u, 100u, 128u, 257u, 640u}) {
    while (n < length) {
      const std::uint32_t n_new = std::min(step - n % step, length - n);
      engine.step({{0, n_new}}, /*scatter=*/false);
      n += n_new;
    }
    if (length % step != 0 && step != 1) {
      continue;  // the engine's steps were cut at the lengths before
    }
    SCOPED_TRACE(length);
    const auto counted =
        layer_bytes(policy, {dims.n_kv_heads, dims.key_dim, dims.value_dim}, length, step);
    ASSERT_TRUE(counted) << counted.error().message;
    expect_same(*counted, engine.cache().bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, LayerBytes,
                         testing::Values(BytesCase{{}, 1}, BytesCase{{{"mode", "paper"}}, 1},
                                         BytesCase{{{"policy", "fp16"}}, 1},
                                         BytesCase{{{"policy", "kivi"}}, 1},
                                         BytesCase{{{"policy", "uniform"}}, 1}));

TEST(LayerBytesOfPrompts, AreThoseOfACacheInUse) {
  for (const std::uint32_t length : {1u, 64u, 100u, 257u, 640u}) {
    for (const std::map<std::string, std::string>& settings :
         {std::map<std::string, std::string>{}, {{"mode", "paper"}}, {{"mode", "official"}}}) {
      for (const std::uint32_t step : {64u, 640u}) {
        SCOPED_TRACE(testing::Message() << length << " by " << step);
        const cache::TestDims dims{
            .n_kv_heads = 1, .group = 1, .key_dim = 16, .value_dim = 48, .n_cells = 640};
        cache::TestEngine engine(dims, settings, kernels::select_kernels("").value(), 1, 1);
        for (std::uint32_t n = 0; n < length; n += step) {
          engine.step({{0, std::min(step, length - n)}}, /*scatter=*/false);
        }
        const auto policy = std::make_shared<policy::Policy>(policy::make_policy(settings).value());
        const auto counted =
            layer_bytes(policy, {dims.n_kv_heads, dims.key_dim, dims.value_dim}, length, step);
        ASSERT_TRUE(counted) << counted.error().message;
        expect_same(*counted, engine.cache().bytes());
      }
    }
  }
}

// The window of tokens that wait must not eat short prompts.
TEST(LayerBytesOfPrompts, TheDefaultHoldsItsRatioFrom256TokensOn) {
  const auto policy = std::make_shared<policy::Policy>(policy::make_policy({}).value());
  const LayerDims dims{.n_kv_heads = 3, .key_dim = 64, .value_dim = 64};  // SmolLM2-135M
  const double longest = layer_bytes(policy, dims, 32768, 512).value().ratio();
  std::vector<std::uint32_t> lengths{840, 1000, 1024, 1500, 2048, 3000, 8192};
  for (std::uint32_t n = 256; n <= 800; n += 4) {
    lengths.push_back(n + n / 4 % 4);  // all remainders by 16
  }
  for (const std::uint32_t n : lengths) {
    EXPECT_GE(layer_bytes(policy, dims, n, 512).value().ratio(), 0.9 * longest) << n << " tokens";
  }
}

// Generation: decoded tokens join the last block 16 at a time. Those that wait are most of what the
// ratio lacks behind a short prompt.
TEST(LayerBytesOfPrompts, TheDefaultLosesLittleInGeneration) {
  const auto policy = std::make_shared<policy::Policy>(policy::make_policy({}).value());
  const LayerDims dims{.n_kv_heads = 3, .key_dim = 64, .value_dim = 64};
  const double longest = layer_bytes(policy, dims, 32768, 512).value().ratio();
  for (const std::uint32_t n : {257u, 271u, 287u, 303u, 335u, 400u, 500u, 609u}) {
    EXPECT_GE(layer_bytes(policy, dims, n, 512, 256).value().ratio(), 0.83 * longest) << n;
  }
  for (const std::uint32_t n : {675u, 807u, 1005u, 1265u, 1539u, 1978u, 2400u, 3000u}) {
    EXPECT_GE(layer_bytes(policy, dims, n, 512, 256).value().ratio(), 0.9 * longest) << n;
  }
}

TEST(LayerBytesOfPrompts, RefusesShapesThatTheCacheRefuses) {
  const auto policy = std::make_shared<policy::Policy>();
  EXPECT_FALSE(layer_bytes(policy, {2, 24, 24}, 10, 1));
  EXPECT_FALSE(layer_bytes(policy, {0, 64, 64}, 10, 1));
}

}  // namespace
}  // namespace zipcache::eval
