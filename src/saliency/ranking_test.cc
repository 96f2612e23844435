#include "saliency/ranking.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "base/check.h"
#include "base/philox.h"
#include "ref/saliency_ref.h"

namespace zipcache::saliency {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The causal attention of method section 3 and what the probe rows of it accumulate.
constexpr std::array<std::array<float, 4>, 4> kAttention{
    {{1, 0, 0, 0}, {.6f, .4f, 0, 0}, {.5f, .2f, .3f, 0}, {.3f, .1f, .1f, .5f}}};
constexpr std::array<std::uint32_t, 4> kAges{4, 3, 2, 1};

std::vector<float> golden_scores(Metric metric, const std::vector<std::size_t>& probes) {
  std::array<float, 4> mass{};
  std::array<std::uint32_t, 4> seen{};
  for (const std::size_t row : probes) {
    for (std::size_t token = 0; token <= row; ++token) {
      mass[token] += kAttention[row][token];
      ++seen[token];
    }
  }
  std::vector<float> scores(4, -1.0f);
  token_scores(metric, {mass, {}, seen, kAges}, 0, scores);
  return scores;
}

void expect_near(const std::vector<float>& actual, const std::vector<float>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t token = 0; token < actual.size(); ++token) {
    EXPECT_NEAR(actual[token], expected[token], 1e-6) << "token " << token;
  }
}

TEST(Scores, GoldenOfThePaper) {
  expect_near(golden_scores(Metric::kAccumulated, {0, 1, 2, 3}), {2.4f, .7f, .4f, .5f});
  expect_near(golden_scores(Metric::kNormalized, {0, 1, 2, 3}), {.6f, .7f / 3, .2f, .5f});
}

TEST(Scores, GoldenOfProbes) {
  expect_near(golden_scores(Metric::kNormalized, {1, 3}), {.45f, .25f, .1f, .5f});
  expect_near(golden_scores(Metric::kOfficial, {1, 3}), {.225f, .5f / 3, .05f, .5f});
}

TEST(Scores, UnseenTokensScoreZero) {
  const std::vector<float> mass{1, 1};
  const std::vector<std::uint32_t> seen{0, 2};
  const std::vector<std::uint32_t> ages{2, 1};
  for (const Metric metric : {Metric::kNormalized, Metric::kAccumulated, Metric::kOfficial}) {
    std::vector<float> scores(2, -1.0f);
    token_scores(metric, {mass, {}, seen, ages}, 0, scores);
    EXPECT_EQ(scores[0], 0.0f);
    EXPECT_GT(scores[1], 0.0f);
  }
}

TEST(Scores, LocalityRanksNewestHighest) {
  std::vector<float> scores(4);
  token_scores(Metric::kLocality, {{}, {}, {}, kAges}, 0, scores);
  EXPECT_TRUE(std::is_sorted(scores.begin(), scores.end()));
  EXPECT_LT(scores[2], scores[3]);
}

TEST(Scores, RandomDependsOnTheSeedOnly) {
  std::vector<float> once(100), again(100), other(100);
  token_scores(Metric::kRandom, {}, 5, once);
  token_scores(Metric::kRandom, {}, 5, again);
  token_scores(Metric::kRandom, {}, 6, other);
  EXPECT_EQ(once, again);
  EXPECT_NE(once, other);
  EXPECT_EQ(std::set<float>(once.begin(), once.end()).size(), once.size());
  EXPECT_GE(*std::min_element(once.begin(), once.end()), 0.0f);
  EXPECT_LT(*std::max_element(once.begin(), once.end()), 1.0f);
}

TEST(Scores, SpansMustMatch) {
  std::vector<float> scores(3);
  const std::vector<float> mass(3);
  const std::vector<std::uint32_t> three(3), two(2);
  EXPECT_THROW(token_scores(Metric::kNormalized, {mass, {}, two, three}, 0, scores),
               ContractViolation);
  EXPECT_THROW(token_scores(Metric::kOfficial, {mass, {}, three, two}, 0, scores),
               ContractViolation);
  EXPECT_THROW(token_scores(Metric::kLocality, {mass, {}, three, two}, 0, scores),
               ContractViolation);
}

TEST(Scores, RocoProtectsLargeDeviations) {
  constexpr std::size_t kTokens = 20, kRows = 10;
  Philox random(3, 0, 0);
  std::vector<double> a(kTokens * kRows);
  for (double& weight : a) {
    weight = random.below(1000) * 1e-3;
  }
  std::vector<std::size_t> rows(kRows);
  std::iota(rows.begin(), rows.end(), std::size_t{0});
  const std::vector<std::uint8_t> visible(a.size(), 1);
  std::vector<float> mass(kTokens), squares(kTokens), scores(kTokens);
  for (std::size_t at = 0; at < a.size(); ++at) {
    mass[at % kTokens] += static_cast<float>(a[at]);
    squares[at % kTokens] += static_cast<float>(a[at] * a[at]);
  }
  const std::vector<std::uint32_t> seen(kTokens, kRows);
  token_scores(Metric::kRoco, {mass, squares, seen, {}}, 0, scores);
  const std::vector<std::size_t> expected = ref::roco_ranking(a, visible, kTokens, rows);
  for (std::size_t rank = 1; rank < kTokens; ++rank) {
    EXPECT_GT(scores[expected[rank]], scores[expected[rank - 1]]) << rank;
  }
}

TEST(Scores, RocoOfFewTokensProtectsNone) {
  for (const std::size_t n : {0u, 1u, 2u, 3u}) {
    const std::vector<float> mass(n, 0.5f), squares(n, 0.3f);
    const std::vector<std::uint32_t> seen(n, 1);
    std::vector<float> scores(n);
    token_scores(Metric::kRoco, {mass, squares, seen, {}}, 0, scores);
    EXPECT_EQ(scores, std::vector<float>(n, 0.5f));
  }
}

TEST(SalientTokens, FloorsRegularTokensInIntegers) {
  EXPECT_EQ(salient_tokens(10, 8000, 1), 8u);  // (1 - 0.8) * 10 in doubles floors to 1
  EXPECT_EQ(salient_tokens(100, 8000, 1), 80u);
  EXPECT_EQ(salient_tokens(840, 6000, 1), 504u);
  EXPECT_EQ(salient_tokens(99, 6000, 1), 60u);  // 39.6 regular tokens are 39
  EXPECT_EQ(salient_tokens(3, 6000, 1), 2u);
  EXPECT_EQ(salient_tokens(2, 6000, 1), 2u);
  EXPECT_EQ(salient_tokens(0, 6000, 1), 0u);
  EXPECT_EQ(salient_tokens(10, 0, 1), 0u);
  EXPECT_EQ(salient_tokens(10, 10000, 1), 10u);
  EXPECT_EQ(salient_tokens(4'000'000'000u, 2500, 1), 1'000'000'000u);
}

TEST(SalientTokens, RoundsToTheNearestMultiple) {
  EXPECT_EQ(salient_tokens(256, 3000, 16), 80u);   // 77
  EXPECT_EQ(salient_tokens(256, 5000, 32), 128u);  // 128
  EXPECT_EQ(salient_tokens(64, 3000, 16), 16u);    // 20
  EXPECT_EQ(salient_tokens(32, 5000, 32), 32u);    // 16: a tie goes up
  EXPECT_EQ(salient_tokens(32, 4900, 32), 32u);    // 16, as 16.32 regular tokens are 16
  EXPECT_EQ(salient_tokens(32, 4600, 32), 0u);     // 15
  EXPECT_EQ(salient_tokens(40, 7800, 16), 32u);    // 32
  EXPECT_EQ(salient_tokens(47, 9700, 32), 32u);    // 46
  EXPECT_EQ(salient_tokens(50, 9700, 64), 50u);    // 49 rounds to 64: capped
  EXPECT_EQ(salient_tokens(47, 10000, 32), 47u);   // all stays all
  EXPECT_EQ(salient_tokens(47, 0, 32), 0u);
}

TEST(SalientTokens, Bounds) {
  EXPECT_THROW(salient_tokens(10, 10001, 1), ContractViolation);
  EXPECT_THROW(salient_tokens(10, 5000, 0), ContractViolation);
}

std::vector<std::uint8_t> tiers_of(const std::vector<float>& scores,
                                   const std::vector<std::uint32_t>& tier_tokens) {
  std::vector<std::uint8_t> tiers(scores.size(), 0xCD);
  assign_tiers(scores, tier_tokens, tiers);
  return tiers;
}
using Tiers = std::vector<std::uint8_t>;

TEST(Tiers, HighestScoresFirst) {
  EXPECT_EQ(tiers_of({.1f, .9f, .5f, .3f}, {1, 2, 1}), (Tiers{2, 0, 1, 1}));
  EXPECT_EQ(tiers_of({.1f, .9f, .5f, .3f}, {0, 3, 0, 1}), (Tiers{3, 1, 1, 1}));
  EXPECT_EQ(tiers_of({.1f, .9f}, {2, 0}), (Tiers{0, 0}));
  EXPECT_EQ(tiers_of({}, {0, 0}), Tiers{});
  EXPECT_EQ(tiers_of({}, {}), Tiers{});
}

TEST(Tiers, TiesLeaveTheOldestLow) {
  EXPECT_EQ(tiers_of({1, 1, 1, 1}, {2, 2}), (Tiers{1, 1, 0, 0}));
  EXPECT_EQ(tiers_of({0.0f, -0.0f}, {1, 1}), (Tiers{1, 0}));
  EXPECT_EQ(tiers_of({-0.0f, 0.0f}, {1, 1}), (Tiers{1, 0}));
}

TEST(Tiers, NanIsLowest) {
  EXPECT_EQ(tiers_of({kNan, -kInfinity}, {1, 1}), (Tiers{1, 0}));
  EXPECT_EQ(tiers_of({-kInfinity, kNan}, {1, 1}), (Tiers{0, 1}));
  EXPECT_EQ(tiers_of({kNan, -1, -kNan, kInfinity, 0}, {2, 1, 2}), (Tiers{2, 1, 2, 0, 0}));
}

// Against the definition, a stable sort by (score, position), on scores with many ties.
TEST(Tiers, AgreeWithSorting) {
  Philox random(3, 0, 0);
  for (std::uint32_t n_tokens = 1; n_tokens <= 200; ++n_tokens) {
    std::vector<float> scores(n_tokens);
    for (float& score : scores) {
      score = static_cast<float>(random.below(20)) - 10.0f;
    }
    const std::uint32_t first = random.below(n_tokens + 1);
    const std::uint32_t second = random.below(n_tokens - first + 1);
    const std::vector<std::uint32_t> tier_tokens{first, second, n_tokens - first - second};

    std::vector<std::uint32_t> order(n_tokens);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(),
                     [&](auto left, auto right) { return scores[left] < scores[right]; });
    std::reverse(order.begin(), order.end());
    Tiers expected(n_tokens, 2);
    for (std::uint32_t rank = 0; rank < first + second; ++rank) {
      expected[order[rank]] = rank < first ? 0 : 1;
    }
    ASSERT_EQ(tiers_of(scores, tier_tokens), expected) << n_tokens;
  }
}

TEST(Tiers, CountsMustAddUp) {
  EXPECT_THROW(tiers_of({1, 2, 3}, {1, 1}), ContractViolation);
  EXPECT_THROW(tiers_of({1, 2, 3}, {1, 3}), ContractViolation);
}

}  // namespace
}  // namespace zipcache::saliency
