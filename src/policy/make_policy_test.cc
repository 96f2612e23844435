#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "policy/method.h"
#include "policy/policy.h"

namespace zipcache::policy {
namespace {

using format::Granularity;
using format::TokenParams;
using saliency::Metric;
using saliency::ProbeRule;
using Settings = std::map<std::string, std::string>;
using Bits = std::array<std::uint8_t, 2>;
using Clip = std::array<float, 2>;

// Two layers; each channel of a head has other figures.
Calibration calibration() {
  Calibration made;
  for (const std::uint32_t layer : {0u, 2u}) {
    LayerCalibration seen = flat_calibration(2, 64, 64).layers.front();
    seen.layer = layer;
    for (std::size_t c = 0; c < seen.key_min.size(); ++c) {
      seen.key_min[c] = -4.0f * float(1 + c % 3);
      seen.query_max[c] = c == 5 ? 0.0f : 1.0f;
      seen.value_max[c] = c == 9 ? 16.0f : 1.0f;
    }
    made.layers.push_back(seen);
  }
  return made;
}

// Policies that need no calibration don't look at it.
Policy policy_of(const Settings& settings) {
  const Calibration calibrated = calibration();
  const Expected<Policy> policy = make_policy(settings, &calibrated);
  if (!policy) {
    ADD_FAILURE() << policy.error().message;
    return {};
  }
  return *policy;
}

std::string error_of(const Settings& settings) {
  const Expected<Policy> policy = make_policy(settings);
  if (policy) {
    return "no error: " + describe(*policy);
  }
  EXPECT_EQ(policy.error().code, ErrorCode::kInvalidArgument);
  return policy.error().message;
}

TEST(MakePolicy, DefaultMode) {
  const Policy policy = policy_of({});
  EXPECT_EQ(policy.name, "zipcache");
  EXPECT_EQ(policy.settings.at("mode"), "default");
  EXPECT_TRUE(policy.seals());

  EXPECT_EQ(policy.key.granularity, Granularity::kChannelwise);
  EXPECT_EQ(policy.key.token_params, TokenParams::kHalf);  // the only ones that a channelwise K has
  EXPECT_EQ(policy.key.n_classes, 2);
  EXPECT_EQ(policy.key.bits, (Bits{4, 2}));
  EXPECT_EQ(policy.key.salient_bp, 2000u);
  EXPECT_EQ(policy.key.class_multiple, 16u);
  EXPECT_EQ(policy.key.rules.clip, (Clip{1.0f, 0.7f}));
  EXPECT_EQ(policy.key.rules.rounding, quant::Rounding::kFloatMin);

  EXPECT_EQ(policy.value.granularity, Granularity::kChannelSeparable);
  EXPECT_EQ(policy.value.token_params, TokenParams::kByte);
  EXPECT_FALSE(policy.value.slot_shared);
  EXPECT_EQ(policy.value.group_channels, 0);
  EXPECT_EQ(policy.value.n_classes, 2);
  EXPECT_EQ(policy.value.bits, (Bits{3, 2}));
  EXPECT_EQ(policy.value.salient_bp, 5000u);
  EXPECT_EQ(policy.value.class_multiple, 32u);
  EXPECT_EQ(policy.value.rules.clip, (Clip{1.0f, 0.75f}));
  EXPECT_EQ(policy.value.rules.rounding, quant::Rounding::kFloatMin);

  EXPECT_EQ(policy.sink_tokens, 2u);
  EXPECT_EQ(policy.hold_tokens, 28u);
  EXPECT_EQ(policy.seal_tokens, 64u);
  EXPECT_EQ(policy.seal_multiple, 16u);
  EXPECT_EQ(policy.rest_tokens, 3u);
  EXPECT_EQ(policy.append_tokens, 16u);
  EXPECT_EQ(policy.min_ranked_tokens, 48u);
  EXPECT_EQ(policy.hold_share_bp, 300u);
  EXPECT_EQ(policy.staging_bits, 8);
  EXPECT_EQ(policy.block_tokens, 512u);
  EXPECT_FALSE(policy.requantize_all);
  EXPECT_EQ(policy.metric, Metric::kNormalized);
  EXPECT_EQ(policy.probes, ProbeRule::kDefault);
  EXPECT_EQ(policy.seed, 0u);
}

TEST(MakePolicy, PublishedModes) {
  for (const char* mode : {"paper", "official"}) {
    const bool paper = mode == std::string("paper");
    const Policy policy = policy_of({{"mode", mode}});
    SCOPED_TRACE(describe(policy));
    EXPECT_EQ(policy.name, "zipcache");
    EXPECT_EQ(policy.settings.at("mode"), mode);
    EXPECT_TRUE(policy.seal_chunks);
    EXPECT_EQ(policy.min_ranked_tokens, 20u);
    for (const TensorPolicy* tensor : {&policy.key, &policy.value}) {
      EXPECT_EQ(tensor->token_params, TokenParams::kHalf);
      EXPECT_EQ(tensor->n_classes, 2);
      EXPECT_EQ(tensor->bits, (Bits{4, 2}));
      EXPECT_EQ(tensor->salient_bp, 6000u);
      EXPECT_EQ(tensor->class_multiple, 1u);
      EXPECT_EQ(tensor->rules.clip, (Clip{1.0f, 1.0f}));
      EXPECT_EQ(tensor->rules.rounding,
                paper ? quant::Rounding::kIntegerOffset : quant::Rounding::kFloatMin);
    }
    EXPECT_EQ(policy.key.granularity, Granularity::kChannelwise);
    EXPECT_FALSE(policy.key.slot_shared);
    EXPECT_EQ(policy.value.granularity, Granularity::kChannelSeparable);
    EXPECT_TRUE(policy.value.slot_shared);
    EXPECT_EQ(policy.sink_tokens, 0u);
    EXPECT_EQ(policy.hold_tokens, 0u);
    EXPECT_EQ(policy.seal_tokens, 100u);
    EXPECT_EQ(policy.seal_multiple, 1u);
    EXPECT_EQ(policy.block_tokens, 0u);
    EXPECT_EQ(policy.requantize_all, !paper);
    EXPECT_EQ(policy.metric, paper ? Metric::kNormalized : Metric::kOfficial);
    EXPECT_EQ(policy.probes, paper ? ProbeRule::kDefault : ProbeRule::kOfficial);
  }
}

TEST(MakePolicy, Uniform) {
  const Policy policy = policy_of({{"policy", "uniform"}});
  EXPECT_EQ(policy.name, "uniform");
  for (const TensorPolicy* tensor : {&policy.key, &policy.value}) {
    EXPECT_EQ(tensor->token_params, TokenParams::kHalf);
    EXPECT_FALSE(tensor->slot_shared);
    EXPECT_EQ(tensor->n_classes, 1);
    EXPECT_EQ(tensor->bits[0], 4);
    EXPECT_EQ(tensor->rules.clip, (Clip{1.0f, 1.0f}));
    EXPECT_EQ(tensor->rules.rounding, quant::Rounding::kFloatMin);
  }
  EXPECT_EQ(policy.key.granularity, Granularity::kChannelwise);
  EXPECT_EQ(policy.value.granularity, Granularity::kChannelSeparable);
  EXPECT_EQ(policy.sink_tokens, 0u);
  EXPECT_EQ(policy.hold_tokens, 32u);
  EXPECT_EQ(policy.seal_tokens, 64u);
  EXPECT_EQ(policy.seal_multiple, 32u);
  EXPECT_EQ(policy.block_tokens, 512u);
}

TEST(MakePolicy, UniformGranularities) {
  struct Case {
    const char* name;
    Granularity key, value;
    int group;
  };
  for (const auto& [name, key, value, group] :
       {Case{"channelwise+cst", Granularity::kChannelwise, Granularity::kChannelSeparable, 0},
        Case{"channelwise+tokenwise", Granularity::kChannelwise, Granularity::kTokenwise, 0},
        Case{"tokenwise", Granularity::kTokenwise, Granularity::kTokenwise, 0},
        Case{"groupwise", Granularity::kTokenwise, Granularity::kTokenwise, 32}}) {
    const Policy policy = policy_of({{"policy", "uniform"}, {"granularity", name}});
    EXPECT_EQ(policy.key.granularity, key) << name;
    EXPECT_EQ(policy.value.granularity, value) << name;
    EXPECT_EQ(policy.key.group_channels, group) << name;
    EXPECT_EQ(policy.value.group_channels, group) << name;
  }
}

TEST(MakePolicy, Kivi) {
  const Policy policy = policy_of({{"policy", "kivi"}});
  EXPECT_EQ(policy.key.granularity, Granularity::kChannelwise);
  EXPECT_EQ(policy.key.group_tokens, 32);
  EXPECT_EQ(policy.value.granularity, Granularity::kTokenwise);
  EXPECT_EQ(policy.value.group_channels, 32);
  for (const TensorPolicy* tensor : {&policy.key, &policy.value}) {
    EXPECT_EQ(tensor->bits[0], 2);
    EXPECT_EQ(tensor->n_classes, 1);
    EXPECT_EQ(tensor->token_params, TokenParams::kHalf);
  }
  EXPECT_EQ(policy.sink_tokens, 0u);
  EXPECT_EQ(policy.hold_tokens, 0u);
  EXPECT_EQ(policy.seal_tokens, 128u);
  EXPECT_EQ(policy.seal_multiple, 128u);
  EXPECT_EQ(policy.value_hold_tokens, 128u);
  EXPECT_EQ(policy_of({{"policy", "kivi"}, {"residual", "0"}}).seal_tokens, 32u);
  EXPECT_EQ(policy_of({{"policy", "kivi"}, {"group", "256"}}).value_hold_tokens, 256u);
  EXPECT_EQ(error_of({{"policy", "kivi"}, {"residual", "100"}}),
            "residual: found '100', accepted: 0 or 32..4096 in steps of 32");
  EXPECT_EQ(error_of({{"policy", "kivi"}, {"key-bits", "4,2"}}),
            "key-bits: found '4,2', accepted widths are 2, 3, 4, 8; one for all tokens");
}

TEST(MakePolicy, Mikv) {
  const Policy policy = policy_of({{"policy", "mikv"}});
  for (const TensorPolicy* tensor : {&policy.key, &policy.value}) {
    EXPECT_EQ(tensor->bits, (Bits{4, 2}));
    EXPECT_EQ(tensor->salient_bp, 6000u);
    EXPECT_EQ(tensor->token_params, TokenParams::kHalf);
  }
  EXPECT_EQ(policy.key.granularity, Granularity::kChannelSeparable);
  EXPECT_EQ(policy.key.factors, Factors::kBalanced);
  EXPECT_EQ(policy.value.granularity, Granularity::kTokenwise);
  EXPECT_EQ(policy.metric, Metric::kAccumulated);
  EXPECT_EQ(policy.probes, ProbeRule::kAll);
  EXPECT_EQ(policy.recent_bp, 3000u);
  EXPECT_EQ(policy_of({{"policy", "mikv"}, {"balancer", "off"}}).key.granularity,
            Granularity::kTokenwise);
  EXPECT_EQ(policy_of({{"policy", "mikv"}, {"value-bits", "16,2"}}).value.bits, (Bits{16, 2}));
  EXPECT_EQ(error_of({{"policy", "mikv"}, {"key-bits", "16,16"}}),
            "key-bits: found '16,16', accepted widths are 2, 3, 4, 8 and for HI 16 as HI or HI,LO");
  EXPECT_EQ(error_of({{"policy", "mikv"}, {"balancer", "yes"}}),
            "balancer: found 'yes', accepted: on, off");
}

TEST(MakePolicy, H2o) {
  const Policy policy = policy_of({{"policy", "h2o"}});
  EXPECT_TRUE(policy.evicts);
  EXPECT_EQ(policy.key.bits, (Bits{format::kExactBits, format::kEvictedBits}));
  EXPECT_EQ(policy.key.salient_bp, 1000u);
  EXPECT_EQ(policy.hold_bp, 1000u);
  EXPECT_EQ(policy.metric, Metric::kAccumulated);
  EXPECT_EQ(policy.probes, ProbeRule::kAll);
  EXPECT_EQ(error_of({{"policy", "h2o"}, {"heavy", "120"}}),
            "heavy: found '120', accepted: percent from 0 to 100 with up to two decimals");
}

TEST(MakePolicy, Gear) {
  const Policy policy = policy_of({{"policy", "gear"}});
  EXPECT_EQ(policy.key.granularity, Granularity::kChannelwise);
  EXPECT_EQ(policy.value.granularity, Granularity::kTokenwise);
  for (const TensorPolicy* tensor : {&policy.key, &policy.value}) {
    EXPECT_EQ(tensor->bits[0], 4);
    EXPECT_EQ(tensor->rank, 4);
    EXPECT_EQ(tensor->small_block_rank, 2);
    EXPECT_EQ(tensor->outlier_bp, 200u);
  }
  EXPECT_EQ(policy.key.group_tokens, 0);
  EXPECT_EQ(policy.seal_tokens, 20u);
  EXPECT_TRUE(policy.seal_chunks);
  const Policy low = policy_of({{"policy", "gear"}, {"key-bits", "2"}, {"value-bits", "2"}});
  EXPECT_EQ(low.key.group_tokens, 64);
  EXPECT_EQ(low.value.group_channels, 64);
  EXPECT_EQ(low.seal_tokens, 64u);
  EXPECT_EQ(policy_of({{"policy", "gear-l"}}).key.outlier_bp, 0u);
  EXPECT_EQ(error_of({{"policy", "gear-l"}, {"outliers", "2"}})
                .find("outliers: does not apply to policy 'gear-l', which takes policy, key-bits"),
            0u);
  EXPECT_EQ(error_of({{"policy", "gear"}, {"rank", "17"}}), "rank: found '17', accepted: 0..16");
}

TEST(MakePolicy, StaticTakesFactorsFromTheCalibration) {
  const Policy policy = policy_of({{"policy", "static"}});
  for (const TensorPolicy* tensor : {&policy.key, &policy.value}) {
    EXPECT_EQ(tensor->granularity, Granularity::kChannelSeparable);
    EXPECT_EQ(tensor->factors, Factors::kGiven);
    EXPECT_EQ(tensor->bits[0], 4);
    EXPECT_EQ(tensor->n_classes, 1);
    EXPECT_FALSE(tensor->reordered);
  }
  EXPECT_EQ(policy.sink_tokens + policy.hold_tokens, 0u);  // every past token is quantized
  EXPECT_TRUE(policy.seal_chunks);
  EXPECT_EQ(policy.seal_tokens, 32u);

  ASSERT_EQ(policy.given.size(), 2u);
  const LayerChannels& channels = policy.given.at(2);
  EXPECT_EQ(channels.n_kv_heads, 2u);
  ASSERT_EQ(channels.key_factors.size(), 128u);
  EXPECT_EQ(channels.key_factors[3], 2.0f);  // sqrt(4 / 1)
  EXPECT_EQ(channels.key_factors[4], std::sqrt(8.0f));
  EXPECT_EQ(channels.key_factors[5], 1.0f);  // no query has it: nothing to balance
  EXPECT_EQ(channels.value_factors[9], 4.0f);
  EXPECT_EQ(channels.value_factors[10], 1.0f);
  EXPECT_TRUE(channels.key_order.empty());
  const quant::QuantRules rules = policy.quant_rules(2);
  EXPECT_EQ(rules.key.given_factors.data(), channels.key_factors.data());
  EXPECT_EQ(rules.value.given_factors.data(), channels.value_factors.data());
  EXPECT_TRUE(policy.quant_rules(1).key.given_factors.empty());
}

TEST(MakePolicy, SkvqOrdersChannelsByTheCalibration) {
  const Policy policy = policy_of({{"policy", "skvq"}});
  for (const TensorPolicy* tensor : {&policy.key, &policy.value}) {
    EXPECT_EQ(tensor->granularity, Granularity::kTokenwise);
    EXPECT_EQ(tensor->token_params, TokenParams::kByte);  // two bytes, as two FP8 numbers
    EXPECT_EQ(tensor->group_channels, 32);                // heads of 64
    EXPECT_EQ(tensor->bits[0], 2);
    EXPECT_EQ(tensor->rules.clip[0], 0.96f);
    EXPECT_TRUE(tensor->rules.clip_about_zero);
    EXPECT_TRUE(tensor->reordered);
    EXPECT_EQ(tensor->factors, Factors::kOwn);
  }
  EXPECT_EQ(policy.sink_tokens, 5u);
  EXPECT_EQ(policy.hold_tokens, 128u);

  const LayerChannels& channels = policy.given.at(0);
  ASSERT_EQ(channels.key_order.size(), 128u);
  std::set<std::uint16_t> first(channels.key_order.begin(), channels.key_order.begin() + 32);
  EXPECT_EQ(first.size(), 32u);
  for (std::uint16_t c = 2; c < 64; c += 3) {  // the widest channels of the head are together
    EXPECT_EQ(first.contains(c), first.contains(2)) << c;
  }
  EXPECT_EQ(policy.quant_rules(0).key.channel_order.data(), channels.key_order.data());
  EXPECT_EQ(policy.quant_rules(0).value.channel_order.data(), channels.value_order.data());
  EXPECT_TRUE(channels.key_factors.empty());
}

TEST(MakePolicy, SkvqGroups) {
  const auto group_of = [](std::uint32_t key_dim, std::uint32_t value_dim) {
    const Calibration flat = flat_calibration(1, key_dim, value_dim);
    return make_policy({{"policy", "skvq"}}, &flat)->key.group_channels;
  };
  EXPECT_EQ(group_of(256, 256), 128);
  EXPECT_EQ(group_of(512, 512), 128);
  EXPECT_EQ(group_of(128, 128), 64);
  EXPECT_EQ(group_of(192, 128), 64);
  EXPECT_EQ(group_of(80, 80), 16);
  EXPECT_EQ(group_of(96, 96), 48);
  EXPECT_EQ(group_of(16, 16), 16);
  EXPECT_EQ(policy_of({{"policy", "skvq"}, {"group", "16"}}).value.group_channels, 16);
  const Calibration flat = flat_calibration(1, 80, 80);
  const auto split = make_policy({{"policy", "skvq"}, {"group", "32"}}, &flat);
  ASSERT_FALSE(split);
  EXPECT_EQ(split.error().message,
            "group: 32 does not split heads of 80 (K) and 80 (V) channels, as layer 0 of the "
            "calibration has them; group 0 is the largest that does");
}

TEST(MakePolicyErrors, Calibration) {
  for (const char* policy : {"static", "skvq"}) {
    EXPECT_EQ(error_of({{"policy", policy}}),
              "calibration: missing, and this policy takes its channels' figures from it; make it "
              "with: zipcache calibrate -m MODEL -o FILE, then set calibration=FILE");
    EXPECT_EQ(error_of({{"policy", policy}, {"calibration", "c.json"}}),
              "calibration: found 'c.json', but no file was read");
    EXPECT_EQ(policy_of({{"policy", policy}, {"calibration", "c.json"}}).settings.at("calibration"),
              "c.json");
  }
  EXPECT_EQ(error_of({{"calibration", "c.json"}})
                .find("calibration: does not apply to policy 'zipcache'"),
            0u);
}

TEST(ServesLayer, OnlyThoseOfTheCalibration) {
  EXPECT_TRUE(serves_layer(policy_of({}), 77, 1, 16, 16));
  for (const char* name : {"static", "skvq"}) {
    const Policy policy = policy_of({{"policy", name}});
    EXPECT_TRUE(serves_layer(policy, 0, 2, 64, 64));
    EXPECT_TRUE(serves_layer(policy, 2, 2, 64, 64));
    const Status other = serves_layer(policy, 1, 2, 64, 64);
    ASSERT_FALSE(other);
    EXPECT_EQ(other.error().message,
              "layer 1 has 2 KV heads of 64 (K) and 64 (V) channels, but the calibration lacks it "
              "among its 2 layers: it is another model's; make one of this with zipcache "
              "calibrate -m MODEL -o FILE");
    const Status narrower = serves_layer(policy, 0, 4, 32, 64);
    ASSERT_FALSE(narrower);
    EXPECT_NE(narrower.error().message.find(
                  "has 4 KV heads of 32 (K) and 64 (V) channels, but the calibration says 2 KV "
                  "heads of 64 (K) and 64 (V) channels"),
              std::string::npos);
    EXPECT_FALSE(serves_layer(policy, 0, 2, 64, 128));
    EXPECT_FALSE(serves_layer(policy, 0, 4, 64, 64));
  }
}

TEST(MakePolicy, Fp16) {
  const Policy policy = policy_of({{"policy", "fp16"}});
  EXPECT_EQ(policy.name, "fp16");
  EXPECT_FALSE(policy.seals());
  EXPECT_EQ(describe(policy), "fp16: every token exact");
}

TEST(MakePolicy, ReadsEverySetting) {
  const Policy policy = policy_of({{"key-bits", "8,4"},
                                   {"value-bits", "4,3"},
                                   {"key-salient", "12.5"},
                                   {"value-salient", "0.07"},
                                   {"key-clip", "0.95"},
                                   {"value-clip", "1,0.5"},
                                   {"value-params", "half"},
                                   {"sinks", "10"},
                                   {"hold", "7"},
                                   {"seal", "96"},
                                   {"block", "512"},
                                   {"metric", "accumulated"},
                                   {"probes", "recent"},
                                   {"seed", "18446744073709551615"}});
  EXPECT_EQ(policy.key.bits, (Bits{8, 4}));
  EXPECT_EQ(policy.value.bits, (Bits{4, 3}));
  EXPECT_EQ(policy.key.salient_bp, 1250u);
  EXPECT_EQ(policy.value.salient_bp, 7u);
  EXPECT_EQ(policy.key.rules.clip, (Clip{0.95f, 0.95f}));
  EXPECT_EQ(policy.value.rules.clip, (Clip{1.0f, 0.5f}));
  EXPECT_EQ(policy.value.token_params, TokenParams::kHalf);
  EXPECT_FALSE(policy.value.slot_shared);
  EXPECT_EQ(policy.sink_tokens, 10u);
  EXPECT_EQ(policy.hold_tokens, 7u);
  EXPECT_EQ(policy.seal_tokens, 96u);
  EXPECT_EQ(policy.block_tokens, 512u);
  EXPECT_EQ(policy.metric, Metric::kAccumulated);
  EXPECT_EQ(policy.probes, ProbeRule::kRecent);
  EXPECT_EQ(policy.seed, ~std::uint64_t{0});
}

TEST(MakePolicy, OneWidthIsOneClass) {
  const Policy policy = policy_of({{"key-bits", "3"}});
  EXPECT_EQ(policy.key.n_classes, 1);
  EXPECT_EQ(policy.key.bits[0], 3);
  EXPECT_EQ(policy.key.salient_bp, 10000u);
  EXPECT_EQ(policy.value.n_classes, 2);
}

TEST(MakePolicy, ClippingFollowsTheWidthInDefaultModeOnly) {
  EXPECT_EQ(policy_of({{"key-bits", "4,2"}}).key.rules.clip, (Clip{1.0f, 0.7f}));
  EXPECT_EQ(policy_of({{"key-bits", "3"}}).key.rules.clip[0], 0.9f);
  EXPECT_EQ(policy_of({{"value-bits", "8,4"}}).value.rules.clip, (Clip{1.0f, 1.0f}));
  EXPECT_EQ(policy_of({{"mode", "paper"}, {"key-bits", "3,2"}}).key.rules.clip, (Clip{1.0f, 1.0f}));
  EXPECT_EQ(policy_of({{"policy", "uniform"}, {"key-bits", "2"}}).key.rules.clip[0], 1.0f);
}

TEST(MakePolicy, HeldTokensFillUpTheSinks) {
  EXPECT_EQ(policy_of({{"policy", "uniform"}, {"sinks", "0"}}).hold_tokens, 32u);
  EXPECT_EQ(policy_of({{"policy", "uniform"}, {"sinks", "33"}}).hold_tokens, 31u);
  EXPECT_EQ(policy_of({{"policy", "uniform"}, {"sinks", "0"}, {"hold", "0"}}).hold_tokens, 0u);
  EXPECT_EQ(policy_of({{"sinks", "0"}}).hold_tokens, 28u);
  EXPECT_EQ(policy_of({{"mode", "paper"}, {"sinks", "4"}}).hold_tokens, 0u);
}

TEST(MakePolicyErrors, UnknownSettings) {
  EXPECT_EQ(error_of({{"key-bitz", "4"}})
                .find("unknown setting 'key-bitz'; did you mean "
                      "'key-bits'? known: policy, mode, kv-bits, "),
            0u);
  EXPECT_EQ(error_of({{"KEY_BITS", "4"}}).find("unknown setting 'KEY_BITS'; known: "), 0u);
  EXPECT_EQ(error_of({{"x", "4"}}).find("unknown setting 'x'; known: "), 0u);
  EXPECT_EQ(error_of({{"", "4"}}).find("unknown setting ''; known: "), 0u);
  EXPECT_EQ(error_of({{"policy", "bad"}, {"sink", "1"}}).find("unknown setting 'sink'; did"), 0u);
}

TEST(MakePolicyErrors, Choices) {
  EXPECT_EQ(error_of({{"policy", "lru"}}).find("policy: found 'lru', accepted: zipcache, fp16, "),
            0u);
  EXPECT_EQ(error_of({{"mode", ""}}), "mode: found '', accepted: default, paper, official");
  EXPECT_EQ(error_of({{"metric", "Normalized"}}),
            "metric: found 'Normalized', accepted: normalized, accumulated, official, random, "
            "locality, last-token, roco");
  EXPECT_EQ(
      error_of({{"probes", "some"}}),
      "probes: found 'some', accepted: default, official, all, recent, random, last, special");
  EXPECT_EQ(error_of({{"value-params", "float"}}),
            "value-params: found 'float', accepted: byte, half");
  EXPECT_EQ(error_of({{"policy", "uniform"}, {"granularity", "cst"}}),
            "granularity: found 'cst', accepted: channelwise+cst, channelwise+tokenwise, "
            "tokenwise, groupwise");
}

TEST(MakePolicyErrors, Bits) {
  for (const char* text : {"5", "", "4,", ",4", "4,5", "4,3,2", "4 ", "4;3", "-4", "260", "0"}) {
    EXPECT_EQ(error_of({{"key-bits", text}}),
              "key-bits: found '" + std::string(text) +
                  "', accepted widths are 2, 3, 4, 8 as HI or HI,LO");
  }
  EXPECT_EQ(error_of({{"value-bits", "2,4"}}),
            "value-bits: found '2,4', but salient tokens (HI) can't have fewer bits than the "
            "others (LO)");
  EXPECT_EQ(error_of({{"policy", "uniform"}, {"value-bits", "4,2"}}),
            "value-bits: found '4,2', accepted widths are 2, 3, 4, 8; one for all tokens");
}

TEST(MakePolicyErrors, Numbers) {
  for (const char* text : {"101", "100.01", "-1", "30%", "1.234", "1.", ".5", "", "1e1", "nan"}) {
    EXPECT_EQ(error_of({{"key-salient", text}}),
              "key-salient: found '" + std::string(text) +
                  "', accepted: percent from 0 to 100 with up to two decimals");
  }
  for (const char* text : {"0", "1.01", "-0.5", "nan", "inf", "", "0.9,", "1,0.9,0.8", "1 0.9"}) {
    EXPECT_EQ(error_of({{"value-clip", text}}),
              "value-clip: found '" + std::string(text) +
                  "', accepted: fractions above 0 and up to 1 as HI,LO or one for both");
  }
  EXPECT_EQ(error_of({{"key-bits", "3"}, {"key-clip", "1,0.9"}}),
            "key-clip: found '1,0.9', accepted: one fraction above 0 and up to 1");
  EXPECT_EQ(error_of({{"seed", "-1"}}),
            "seed: found '-1', accepted: a whole number from 0 to 18446744073709551615");
  EXPECT_EQ(error_of({{"sinks", "4097"}}), "sinks: found '4097', accepted: 0..4096");
  EXPECT_EQ(error_of({{"hold", "65537"}}), "hold: found '65537', accepted: 0..65536");
  EXPECT_EQ(error_of({{"seal", "50"}}), "seal: found '50', accepted: 16..65536 in steps of 16");
  EXPECT_EQ(error_of({{"seal", "0"}}), "seal: found '0', accepted: 16..65536 in steps of 16");
  EXPECT_EQ(error_of({{"seal", "99999999999"}}),
            "seal: found '99999999999', accepted: 16..65536 in steps of 16");
  EXPECT_EQ(error_of({{"policy", "uniform"}, {"seal", "48"}}),
            "seal: found '48', accepted: 32..65536 in steps of 32");
  EXPECT_EQ(error_of({{"mode", "paper"}, {"seal", "15"}}), "seal: found '15', accepted: 16..65536");
  EXPECT_EQ(error_of({{"block", "100"}}),
            "block: found '100', accepted: 0 or 16..65536 in steps of 16");
  EXPECT_EQ(error_of({{"staging-bits", "4"}}), "staging-bits: found '4', accepted: 8, 16");
  EXPECT_EQ(error_of({{"policy", "uniform"}, {"granularity", "groupwise"}, {"group", "40"}}),
            "group: found '40', accepted: 16..512 in steps of 16");
}

TEST(MakePolicyErrors, Budget) {
  for (const char* text : {"2.19", "4.01", "3.005", "-3", "", "three"}) {
    EXPECT_EQ(error_of({{"kv-bits", text}}),
              "kv-bits: found '" + std::string(text) +
                  "', accepted: 0 or 2.2..4 with up to two decimals");
  }
  EXPECT_EQ(error_of({{"kv-bits", "3"}, {"key-wide", "25"}}),
            "key-wide: found '25', but kv-bits chooses it");
  EXPECT_EQ(error_of({{"kv-bits", "3"}, {"value-salient", "25"}}),
            "value-salient: found '25', but kv-bits chooses it");
  EXPECT_EQ(error_of({{"kv-bits", "3"}, {"value-bits", "3"}}),
            "kv-bits: found '3', but key-bits or value-bits gives all tokens the same width");
  EXPECT_EQ(error_of({{"kv-bits", "3"}, {"mode", "paper"}}),
            "kv-bits: found '3', but the widths of mode 'paper' are those of the publication");
  EXPECT_EQ(error_of({{"key-wide", "0"}, {"key-wide-bits", "4"}}),
            "key-wide-bits: found '4', but key-wide 0 leaves no channels for them");
}

TEST(MakePolicy, OnlyTwoBitKeysHaveWideChannels) {
  EXPECT_EQ(policy_of({}).key.wide_bp, 5000u);
  EXPECT_EQ(policy_of({{"key-bits", "4,3"}}).key.wide_bp, 0u);
  EXPECT_EQ(policy_of({{"key-bits", "8"}}).key.wide_bp, 0u);
  EXPECT_EQ(policy_of({{"mode", "paper"}}).key.wide_bp, 0u);
}

TEST(MakePolicyErrors, SettingsThatDoNotApply) {
  EXPECT_EQ(error_of({{"policy", "fp16"}, {"key-salient", "30"}}),
            "key-salient: does not apply to policy 'fp16', which takes policy");
  EXPECT_EQ(error_of({{"granularity", "tokenwise"}})
                .find("granularity: does not apply to policy 'zipcache', which takes policy, mode"),
            0u);
  EXPECT_EQ(error_of({{"policy", "uniform"}, {"mode", "paper"}})
                .find("mode: does not apply to policy 'uniform', which takes policy, key-bits"),
            0u);
  EXPECT_EQ(error_of({{"policy", "uniform"}, {"group", "32"}}),
            "group: found '32', but only granularity 'groupwise' has groups");
  EXPECT_EQ(error_of({{"value-bits", "3"}, {"value-salient", "50"}}),
            "value-salient: found '50', but value-bits gives all tokens the same width");
  EXPECT_EQ(error_of({{"mode", "paper"}, {"value-params", "byte"}}),
            "value-params: found 'byte', but mode 'paper' shares them over the heads, which takes "
            "'half'");
}

TEST(MakePolicy, MetricsBringTheirProbes) {
  EXPECT_EQ(policy_of({{"metric", "last-token"}}).probes, ProbeRule::kLast);
  EXPECT_EQ(policy_of({{"metric", "roco"}}).probes, ProbeRule::kAll);
  EXPECT_EQ(policy_of({{"metric", "roco"}, {"probes", "recent"}}).probes, ProbeRule::kRecent);
  const Policy special = policy_of({{"probes", "special"}, {"probe-positions", "0,3,10-12"}});
  EXPECT_EQ(special.probe_positions, (std::vector<std::uint32_t>{0, 3, 10, 11, 12}));
}

TEST(MakePolicyErrors, Probes) {
  EXPECT_EQ(error_of({{"metric", "last-token"}, {"probes", "all"}}),
            "probes: found 'all', but metric 'last-token' measures the last query alone");
  EXPECT_EQ(error_of({{"probes", "special"}}),
            "probe-positions: missing; probes 'special' needs them");
  EXPECT_EQ(error_of({{"probe-positions", "3"}}),
            "probe-positions: found '3', but only probes 'special' have positions");
  for (const char* text : {"", "3,3", "4,2", "5-4", "1-", "-1", "1,", "1,2-1", "16777216", "a"}) {
    EXPECT_EQ(error_of({{"probes", "special"}, {"probe-positions", text}}),
              "probe-positions: found '" + std::string(text) +
                  "', accepted: ascending numbers and ranges below 16777216, as 0,3,10-19");
  }
}

TEST(MakePolicyErrors, AreOneLine) {
  EXPECT_EQ(error_of({{"seed", "1\n2\x7f"}}),
            "seed: found '1?2?', accepted: a whole number from 0 to 18446744073709551615");
  EXPECT_EQ(error_of({{"a\r\nb", "1"}}).find("unknown setting 'a??b'; known: "), 0u);
}

// Every setting answers a malformed value under its own name.
TEST(SettingHelp, NamesEverySettingOnce) {
  std::set<std::string> names;
  for (const SettingHelp& help : setting_help()) {
    EXPECT_TRUE(names.insert(help.name).second) << help.name;
    EXPECT_FALSE(help.values.empty());
    EXPECT_FALSE(help.help.empty());
    const std::string error = error_of({{help.name, "no such value"}});
    EXPECT_EQ(error.find(help.name + ": "), 0u) << error;
  }
  EXPECT_EQ(names,
            (std::set<std::string>{
                "policy",     "mode",         "kv-bits",     "key-wide",      "key-wide-bits",
                "key-bits",   "value-bits",   "key-salient", "value-salient", "key-clip",
                "value-clip", "granularity",  "group",       "residual",      "value-params",
                "sinks",      "hold",         "hold-share",  "append",        "seal",
                "block",      "staging-bits", "heavy",       "recent",        "balancer",
                "rank",       "outliers",     "metric",      "probes",        "probe-positions",
                "seed",       "calibration"}));
}

TEST(PolicyHelp, NamesEveryPolicyAndItsDefaults) {
  std::set<std::string> names;
  for (const PolicyHelp& help : policy_help()) {
    EXPECT_TRUE(names.insert(help.name).second) << help.name;
    EXPECT_FALSE(help.summary.empty());
    for (const auto& [name, text] : help.defaults) {
      EXPECT_NE(name, "policy");
    }
  }
  EXPECT_EQ(policy_help().front().name, "zipcache");
  EXPECT_EQ(policy_help().front().defaults.at("key-bits"), "4,2");
  EXPECT_TRUE(names.contains("zipcache mode=official"));
}

// What a policy lists is what it reads: nothing is accepted and ignored, nothing read but hidden.
TEST(PolicyHelp, ListedSettingsAreThoseThatAreRead) {
  for (const Method& method : methods()) {
    const Policy policy = policy_of({{"policy", std::string(method.name)}});
    for (const auto& [name, text] : policy.settings) {
      EXPECT_TRUE(name == "policy" || std::count(method.settings.begin(), method.settings.end(),
                                                 std::string_view(name)) == 1)
          << method.name << " reads " << name;
    }
    for (const std::string_view name : method.settings) {
      const std::string error =
          error_of({{"policy", std::string(method.name)}, {std::string(name), "no such value"}});
      EXPECT_EQ(error.find(std::string(name) + ": found 'no such value'"), 0u) << error;
    }
  }
}

TEST(Describe, OneLine) {
  EXPECT_EQ(
      describe(policy_of({})),
      "zipcache default: K channelwise 4/2 bits (20 % salient, 50 % of channels 4 bits, clip "
      "1/0.7), V channel-separable 3/2 bits (50 % salient, clip 1/0.75, byte params); 2 "
      "sinks, hold 28 or 3 %, 8 bits until sealed, seal 64 in blocks of 512, which 16 more may "
      "join; metric normalized, probes default, seed 0");
  EXPECT_EQ(
      describe(policy_of({{"kv-bits", "2.75"}})),
      "zipcache default of at most 2.75 bits: K channelwise 4/2 bits (some of channels 4 "
      "bits, clip 1/0.7), V channel-separable 3/2 bits (clip 1/0.75, byte params); 2 sinks, "
      "hold 28 or 3 %, 8 bits until sealed, seal 64 in blocks of 512, which 16 more may join; "
      "metric normalized, probes default, seed 0");
  EXPECT_EQ(describe(policy_of({{"policy", "uniform"}, {"granularity", "groupwise"}})),
            "uniform: K tokenwise by 32 4 bits (clip 1, half params), V tokenwise by 32 4 bits "
            "(clip 1, half params); 0 sinks, hold 32, seal 64 in blocks of 512");
  EXPECT_EQ(describe(policy_of({{"policy", "static"}})),
            "static: K channel-separable 4 bits (clip 1, half params, calibrated factors), V "
            "channel-separable 4 bits (clip 1, half params, calibrated factors); 0 sinks, hold 0, "
            "seal 32 in one block");
  EXPECT_EQ(describe(policy_of({{"policy", "skvq"}})),
            "skvq: K tokenwise by 32 2 bits (clip 0.96, byte params, calibrated order), V "
            "tokenwise by 32 2 bits (clip 0.96, byte params, calibrated order); 5 sinks, hold 128, "
            "seal 64 in blocks of 512");
}

TEST(ToSettings, MakesTheSamePolicyAgain) {
  const std::vector<Settings> all_settings = {
      {},
      {{"kv-bits", "2.6"}},
      {{"key-wide", "50"}, {"key-wide-bits", "8"}},
      {{"policy", "fp16"}},
      {{"policy", "uniform"}},
      {{"policy", "uniform"}, {"granularity", "channelwise+tokenwise"}, {"value-params", "byte"}},
      {{"policy", "uniform"}, {"granularity", "tokenwise"}, {"key-clip", "0.3"}},
      {{"policy", "uniform"}, {"granularity", "groupwise"}, {"group", "64"}, {"key-bits", "8"}},
      {{"mode", "paper"}},
      {{"policy", "kivi"}, {"key-bits", "4"}, {"value-bits", "4"}, {"residual", "32"}},
      {{"policy", "kivi"}, {"residual", "0"}},
      {{"policy", "h2o"}},
      {{"policy", "h2o"}, {"heavy", "20"}, {"recent", "0"}, {"seal", "1"}},
      {{"policy", "gear"}},
      {{"policy", "mikv"}},
      {{"policy", "mikv"}, {"key-bits", "16,3"}, {"balancer", "off"}, {"recent", "12.5"}},
      {{"policy", "gear"}, {"key-bits", "2"}, {"value-bits", "2"}, {"outliers", "1.5"}},
      {{"policy", "gear-l"}, {"rank", "8"}},
      {{"policy", "static"}, {"key-bits", "8"}, {"calibration", "c.json"}},
      {{"policy", "skvq"}, {"group", "16"}, {"key-clip", "0.92"}, {"hold", "0"}},
      {{"mode", "official"}, {"seal", "50"}, {"block", "1000"}},
      {{"key-bits", "3"}, {"value-salient", "33.33"}, {"metric", "random"}, {"seed", "77"}},
      {{"key-salient", "0.1"}, {"value-salient", "99.05"}, {"probes", "last"}, {"sinks", "8"}},
      {{"metric", "roco"}},
      {{"metric", "last-token"}},
      {{"probes", "special"}, {"probe-positions", "0,7-9"}},
  };
  std::set<std::string> lines;
  for (const Settings& settings : all_settings) {
    const Policy policy = policy_of(settings);
    const Settings complete = to_settings(policy);
    const Policy again = policy_of(complete);
    EXPECT_EQ(describe(again), describe(policy));
    EXPECT_EQ(to_settings(again), complete);
    EXPECT_EQ(again.key.salient_bp, policy.key.salient_bp);
    EXPECT_EQ(again.value.salient_bp, policy.value.salient_bp);
    EXPECT_EQ(again.key.class_multiple, policy.key.class_multiple);
    EXPECT_EQ(again.seal_multiple, policy.seal_multiple);
    for (const auto& [name, text] : settings) {
      EXPECT_EQ(complete.at(name), text) << name;
    }
    EXPECT_TRUE(lines.insert(describe(policy)).second) << describe(policy);
  }
}

}  // namespace
}  // namespace zipcache::policy
