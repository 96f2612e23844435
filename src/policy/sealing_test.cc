#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "format/block_join.h"
#include "policy/policy.h"

namespace zipcache::policy {
namespace {

using Blocks = std::vector<std::uint32_t>;

Policy policy_of(const std::map<std::string, std::string>& settings) {
  return make_policy(settings).value();
}

TEST(PlanSeal, UniformSealsEvenBlocksOldestFirst) {
  const Policy policy = policy_of({{"policy", "uniform"}, {"block", "256"}});
  EXPECT_EQ(plan_seal(policy, 0, 1), Blocks{});
  EXPECT_EQ(plan_seal(policy, 63, 1), Blocks{});
  EXPECT_EQ(plan_seal(policy, 64, 1), (Blocks{64}));
  EXPECT_EQ(plan_seal(policy, 95, 1), (Blocks{64}));
  EXPECT_EQ(plan_seal(policy, 96, 1), (Blocks{96}));
  EXPECT_EQ(plan_seal(policy, 256, 256), (Blocks{256}));
  EXPECT_EQ(plan_seal(policy, 288, 288), (Blocks{160, 128}));
  EXPECT_EQ(plan_seal(policy, 480, 480), (Blocks{256, 224}));
  EXPECT_EQ(plan_seal(policy, 2016, 2048), (Blocks{256, 256, 256, 256, 256, 256, 256, 224}));
}

TEST(PlanSeal, DefaultSealsARestThatWouldCostMoreToWait) {
  const Policy policy = policy_of({{"block", "256"}});
  EXPECT_EQ(plan_seal(policy, 63, 1), Blocks{});
  EXPECT_EQ(plan_seal(policy, 64, 1), (Blocks{64}));
  EXPECT_EQ(plan_seal(policy, 67, 1), (Blocks{64}));
  EXPECT_EQ(plan_seal(policy, 68, 1), (Blocks{68}));
  EXPECT_EQ(plan_seal(policy, 256, 256), (Blocks{256}));
  EXPECT_EQ(plan_seal(policy, 259, 259), (Blocks{256}));
  EXPECT_EQ(plan_seal(policy, 260, 260), (Blocks{144, 116}));
  EXPECT_EQ(plan_seal(policy, 517, 517), (Blocks{176, 176, 165}));
}

TEST(HeldTokens, AreAShareOfWhatIsBeyondAShortSequence) {
  const Policy policy = policy_of({{"hold", "28"}, {"hold-share", "4"}});
  EXPECT_EQ(held_tokens(policy, 0), 0u);
  EXPECT_EQ(held_tokens(policy, 536), 0u);
  EXPECT_EQ(held_tokens(policy, 537), 1u);
  EXPECT_EQ(held_tokens(policy, 1211), 27u);
  EXPECT_EQ(held_tokens(policy, 1212), 28u);
  EXPECT_EQ(held_tokens(policy, UINT32_MAX), 28u);
  EXPECT_EQ(held_tokens(policy_of({{"hold-share", "100"}}), 1), 28u);
  EXPECT_EQ(held_tokens(policy_of({{"policy", "uniform"}}), 1), 32u);
  EXPECT_EQ(held_tokens(policy_of({{"policy", "h2o"}, {"recent", "10"}}), 1000), 100u);
}

TEST(AppendTokens, MoreWaitInALongSequence) {
  const Policy policy = policy_of({});
  EXPECT_EQ(append_tokens(policy, 100), 16u);
  EXPECT_EQ(append_tokens(policy, 1132), 16u);
  EXPECT_EQ(append_tokens(policy, 1134), 17u);
  EXPECT_EQ(append_tokens(policy, UINT32_MAX), 64u);
  EXPECT_EQ(append_tokens(policy_of({{"append", "64"}, {"seal", "16"}}), 1), 64u);
}

TEST(AddedShape, KeepsTheSharesOfTheWhole) {
  const Policy policy = policy_of({});
  format::BlockShape block = block_shape(policy, 512, 3, 64, 64);
  for (int i = 0; i < 100; ++i) {
    const auto added = added_shape(policy, block, 16);
    ASSERT_TRUE(added.has_value());
    EXPECT_EQ(added->n_tokens, 16u);
    EXPECT_LE(added->key.class0_tokens, added->value.class0_tokens);
    block = format::joined_shape(block, *added).value();
    EXPECT_NEAR(block.key.class0_tokens, 0.2 * block.n_tokens, 8);
    EXPECT_NEAR(block.value.class0_tokens, 0.5 * block.n_tokens, 16);
  }
}

TEST(AddedShape, PadsNoLanesOfASmallBlock) {
  const Policy policy = policy_of({});
  format::BlockShape block = block_shape(policy, 256, 3, 64, 64);
  while (block.n_tokens < 512) {
    block = format::joined_shape(block, added_shape(policy, block, 16).value()).value();
    EXPECT_EQ(block.key.class0_tokens % 16, 0u);
    EXPECT_EQ(block.value.class0_tokens % 16, 0u);
  }
}

TEST(AddedShape, NothingJoinsABlockOfOneClassOrOfAnotherKind) {
  const Policy policy = policy_of({});
  EXPECT_FALSE(added_shape(policy, block_shape(policy, 47, 1, 64, 64), 16).has_value());
  EXPECT_TRUE(added_shape(policy, block_shape(policy, 48, 1, 64, 64), 16).has_value());
  const Policy paper = policy_of({{"mode", "paper"}});
  EXPECT_FALSE(added_shape(paper, block_shape(paper, 512, 1, 64, 64), 16).has_value());
}

TEST(AddedShape, ABudgetIsKept) {
  for (const char* bits : {"2.2", "2.6", "3.2", "4"}) {
    const Policy policy = policy_of({{"kv-bits", bits}});
    format::BlockShape block = block_shape(policy, 512, 3, 64, 64);
    while (block.n_tokens < 2048) {
      block = format::joined_shape(block, added_shape(policy, block, 16).value()).value();
      const double elements = block.n_tokens * 3.0 * 128;
      EXPECT_LE(8.0 * static_cast<double>(format::BlockLayout(block).total_bytes()) / elements,
                std::stod(bits) + 0.05)
          << block.n_tokens;
    }
  }
}

TEST(PlanSeal, Fp16NeverSeals) {
  EXPECT_EQ(plan_seal(policy_of({{"policy", "fp16"}}), 100000, 100000), Blocks{});
}

TEST(PlanSeal, PublishedModesSealAPrefillWholeAndDecodeByTheHundred) {
  for (const char* mode : {"paper", "official"}) {
    const Policy policy = policy_of({{"mode", mode}});
    EXPECT_EQ(plan_seal(policy, 840, 840), (Blocks{840}));
    EXPECT_EQ(plan_seal(policy, 40000, 40000), (Blocks{40000}));
    EXPECT_EQ(plan_seal(policy, 7, 7), (Blocks{7}));
    EXPECT_EQ(plan_seal(policy, 0, 7), Blocks{});
    EXPECT_EQ(plan_seal(policy, 1, 1), Blocks{});
    EXPECT_EQ(plan_seal(policy, 99, 1), Blocks{});
    EXPECT_EQ(plan_seal(policy, 100, 1), (Blocks{100}));
  }
}

TEST(PlanSeal, UniformDoesNotLookAtNewTokens) {
  const Policy policy = policy_of({{"policy", "uniform"}});
  for (std::uint32_t n_sealable = 0; n_sealable <= 1000; ++n_sealable) {
    EXPECT_EQ(plan_seal(policy, n_sealable, 1), plan_seal(policy, n_sealable, n_sealable));
  }
}

TEST(PlanSeal, DefaultSealsTheEndOfAPromptSoonerThanDecodedTokens) {
  const Policy policy = policy_of({{"block", "0"}});
  EXPECT_EQ(plan_seal(policy, 40, 1), Blocks{});
  EXPECT_EQ(plan_seal(policy, 40, 15), Blocks{});
  EXPECT_EQ(plan_seal(policy, 15, 16), Blocks{});
  EXPECT_EQ(plan_seal(policy, 16, 16), Blocks{16});
  EXPECT_EQ(plan_seal(policy, 40, 16), Blocks{40});
}

TEST(PlanSeal, KiviSealsKeysByTheResidualAndItsHeldValuesInSmallBlocks) {
  const Policy policy = policy_of({{"policy", "kivi"}});
  EXPECT_EQ(plan_seal(policy, 127, 1), Blocks{});
  EXPECT_EQ(plan_seal(policy, 128, 1), (Blocks{32, 32, 32, 32}));
  EXPECT_EQ(plan_seal(policy, 255, 255), (Blocks{32, 32, 32, 32}));
  EXPECT_EQ(plan_seal(policy, 1000, 1000), (Blocks{768, 32, 32, 32, 32}));
  EXPECT_EQ(plan_seal(policy_of({{"policy", "kivi"}, {"residual", "0"}}), 70, 1), Blocks{64});
}

TEST(PlanSeal, Properties) {
  const std::vector<std::map<std::string, std::string>> all_settings = {
      {},
      {{"policy", "uniform"}},
      {{"block", "32"}},
      {{"block", "96"}, {"seal", "160"}},
      {{"block", "0"}},
      {{"mode", "paper"}},
      {{"mode", "official"}, {"block", "77"}, {"seal", "16"}},
  };
  for (const auto& settings : all_settings) {
    const Policy policy = policy_of(settings);
    SCOPED_TRACE(describe(policy));
    for (std::uint32_t n_sealable = 0; n_sealable <= 1000; ++n_sealable) {
      const Blocks blocks = plan_seal(policy, n_sealable, 1);
      const std::uint32_t sum = std::accumulate(blocks.begin(), blocks.end(), 0u);
      const std::uint32_t rest = n_sealable % policy.seal_multiple;
      const std::uint32_t all = rest > policy.rest_tokens ? n_sealable : n_sealable - rest;
      ASSERT_EQ(sum, n_sealable < policy.seal_tokens ? 0 : all) << n_sealable;
      if (blocks.empty()) {
        continue;
      }
      EXPECT_TRUE(std::is_sorted(blocks.rbegin(), blocks.rend()));
      EXPECT_LT(blocks.front() - blocks.back(), 2 * policy.seal_multiple);
      EXPECT_GT(blocks.back(), 0u);
      for (std::size_t i = 0; i + 1 < blocks.size(); ++i) {
        EXPECT_EQ(blocks[i] % policy.seal_multiple, 0u);
      }
      EXPECT_EQ(blocks.back() % policy.seal_multiple, sum % policy.seal_multiple);
      if (policy.block_tokens == 0) {
        EXPECT_EQ(blocks.size(), 1u);
      } else {
        EXPECT_LE(blocks.front(), policy.block_tokens);
        EXPECT_EQ(blocks.size(), (sum + policy.block_tokens - 1) / policy.block_tokens);
      }
    }
  }
}

TEST(BlockShape, DefaultRoundsClassesToWholeLanes) {
  const format::BlockShape shape = block_shape(policy_of({}), 256, 3, 64, 128);
  EXPECT_EQ(shape.n_tokens, 256u);
  EXPECT_EQ(shape.n_kv_heads, 3u);
  EXPECT_EQ(shape.key_dim, 64u);
  EXPECT_EQ(shape.value_dim, 128u);
  EXPECT_EQ(shape.key, (format::TensorFormat{.granularity = format::Granularity::kChannelwise,
                                             .n_classes = 2,
                                             .bits = {4, 2},
                                             .class0_tokens = 48,
                                             .wide_channels = 32}));
  EXPECT_EQ(shape.value,
            (format::TensorFormat{.granularity = format::Granularity::kChannelSeparable,
                                  .token_params = format::TokenParams::kByte,
                                  .n_classes = 2,
                                  .bits = {3, 2},
                                  .class0_tokens = 128}));
}

TEST(BlockShape, DefaultClassesAreMultiplesInEveryBlockThatIsPlanned) {
  const Policy policy = policy_of({});
  for (std::uint32_t n_tokens = 32; n_tokens <= 256; n_tokens += 32) {
    const format::BlockShape shape = block_shape(policy, n_tokens, 3, 64, 64);
    EXPECT_EQ(shape.key.class0_tokens % 16, 0u);
    EXPECT_EQ(shape.value.class0_tokens % 32, 0u);
    EXPECT_LE(shape.value.class0_tokens, n_tokens);
  }
}

TEST(BlockShape, PublishedModesCountExactly) {
  for (const char* mode : {"paper", "official"}) {
    const Policy policy = policy_of({{"mode", mode}});
    for (const auto& [n_tokens, salient] :
         std::map<std::uint32_t, std::uint32_t>{{840, 504}, {100, 60}, {21, 13}, {20, 12}}) {
      const format::BlockShape shape = block_shape(policy, n_tokens, 8, 128, 128);
      EXPECT_EQ(shape.key.class0_tokens, salient);
      EXPECT_EQ(shape.value.class0_tokens, salient);
      EXPECT_TRUE(shape.value.slot_shared);
    }
    for (const std::uint32_t n_tokens : {1u, 2u, 19u}) {  // too few to rank: all salient
      const format::BlockShape shape = block_shape(policy, n_tokens, 8, 128, 128);
      EXPECT_EQ(shape.key.class0_tokens, n_tokens);
      EXPECT_EQ(shape.value.class0_tokens, n_tokens);
    }
  }
}

TEST(BlockShape, UniformHasOneClass) {
  const Policy policy =
      policy_of({{"policy", "uniform"}, {"granularity", "groupwise"}, {"group", "16"}});
  const format::BlockShape shape = block_shape(policy, 256, 3, 64, 64);
  EXPECT_EQ(shape.key, shape.value);
  EXPECT_EQ(shape.key, (format::TensorFormat{.granularity = format::Granularity::kTokenwise,
                                             .group_channels = 16,
                                             .n_classes = 1,
                                             .bits = {4, 4}}));
}

TEST(BlockShape, GearRoundsOutliersAndLowersTheRankOfBuffers) {
  const Policy policy = policy_of({{"policy", "gear"}});
  const format::BlockShape prompt = block_shape(policy, 1024, 8, 128, 128);
  EXPECT_EQ(prompt.key.rank, 4);
  EXPECT_EQ(prompt.key.outliers, 20);   // 10.24 of the largest, as many of the smallest
  EXPECT_EQ(prompt.value.outliers, 2);  // 1.28
  const format::BlockShape buffer = block_shape(policy, 20, 8, 128, 128);
  EXPECT_EQ(buffer.key.rank, 2);
  EXPECT_EQ(buffer.key.outliers, 0);  // 0.2
  EXPECT_EQ(block_shape(policy, 3, 8, 128, 16).value.outliers, 0);
}

double bits_per_element(const format::BlockShape& shape) {
  return 8.0 * static_cast<double>(format::BlockLayout(shape).total_bytes()) /
         (double(shape.n_tokens) * shape.n_kv_heads * (shape.key_dim + shape.value_dim));
}

TEST(BlockShape, ABudgetIsMetAndUsed) {
  for (const std::uint32_t dim : {64u, 128u, 256u}) {
    double last = 0;
    for (const char* bits : {"2.6", "2.8", "3", "3.2", "3.5"}) {
      const Policy policy = policy_of({{"kv-bits", bits}});
      const double spent = bits_per_element(block_shape(policy, 512, 3, dim, dim));
      EXPECT_LE(spent, std::stod(bits)) << dim;
      EXPECT_GT(spent, std::stod(bits) - 0.16) << dim;  // 16 channels of 64 are 0.25 bit of a key
      EXPECT_GT(spent, last);
      last = spent;
    }
  }
}

TEST(BlockShape, ABudgetTooSmallForABlockBuysTheLeast) {
  const Policy policy = policy_of({{"kv-bits", "2.2"}});
  const std::uint32_t least = least_centibits(policy, 32, 3, 64, 64);
  EXPECT_GT(least, 220u);
  const format::BlockShape shape = block_shape(policy, 32, 3, 64, 64);
  EXPECT_NEAR(bits_per_element(shape), least / 100.0, 0.01);
  EXPECT_EQ(shape.key.wide_channels, 0);
  EXPECT_EQ(shape.key.class0_tokens, 0u);
  EXPECT_EQ(shape.value.class0_tokens, 0u);
}

TEST(BlockShape, WideChannelsComeBySixteen) {
  const auto wide = [](const char* share, std::uint32_t dim) {
    return block_shape(policy_of({{"key-wide", share}}), 256, 3, dim, dim).key.wide_channels;
  };
  EXPECT_EQ(wide("25", 64), 16);
  EXPECT_EQ(wide("25", 256), 64);
  EXPECT_EQ(wide("37", 64), 16);
  EXPECT_EQ(wide("38", 64), 32);
  EXPECT_EQ(wide("100", 64), 48) << "some are not wide";
  EXPECT_EQ(wide("100", 16), 0);
  EXPECT_EQ(wide("0", 64), 0);
}

TEST(BlockShape, Fp16HasNone) {
  EXPECT_THROW(block_shape(policy_of({{"policy", "fp16"}}), 256, 3, 64, 64), ContractViolation);
}

}  // namespace
}  // namespace zipcache::policy
