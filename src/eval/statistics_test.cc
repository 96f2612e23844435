#include "eval/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "eval/divergence.h"
#include "eval/windows.h"

namespace zipcache::eval {
namespace {

TEST(Mean, HasTheStandardErrorOfTheMean) {
  std::vector<double> values;
  for (int i = 0; i < 100; ++i) {
    values.push_back(i % 2);
  }
  const Estimate mean = estimate_mean(values);
  EXPECT_DOUBLE_EQ(mean.mean, 0.5);
  EXPECT_DOUBLE_EQ(mean.error, 0.5 / std::sqrt(99.0));
  EXPECT_EQ(estimate_mean(std::vector<double>{1, 2, 3}).error, 0);  // too few
  EXPECT_EQ(estimate_mean({}).mean, 0);
}

TEST(Percentile, Interpolates) {
  const std::vector<float> sorted{1, 2, 3, 5};
  EXPECT_DOUBLE_EQ(percentile(sorted, 0), 1);
  EXPECT_DOUBLE_EQ(percentile(sorted, 1), 5);
  EXPECT_DOUBLE_EQ(percentile(sorted, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(percentile(std::vector<float>{7}, 0.999), 7);
}

TEST(McNemar, KnownValues) {
  EXPECT_DOUBLE_EQ(mcnemar_p(0, 0), 1);
  EXPECT_DOUBLE_EQ(mcnemar_p(3, 3), 1);
  EXPECT_NEAR(mcnemar_p(5, 0), 0.0625, 1e-12);
  EXPECT_NEAR(mcnemar_p(0, 5), 0.0625, 1e-12);
  EXPECT_NEAR(mcnemar_p(1, 9), 22.0 / 1024, 1e-12);
  EXPECT_NEAR(mcnemar_p(10, 20), 0.098737, 1e-6);  // 2 P(X <= 10), X of B(30, 1/2)
  EXPECT_LT(mcnemar_p(0, 2000), 1e-300);           // no overflow on the way
}

TEST(Bootstrap, CoversTheMeanAndFollowsTheSeed) {
  std::vector<double> values;
  for (int i = 0; i < 400; ++i) {
    values.push_back(i % 4 == 0 ? 1 : 0);
  }
  const Interval interval = bootstrap_mean(values, 1, 7);
  // Normal approximation: 0.25 +- 1.96 * sqrt(0.25 * 0.75 / 400) = 0.25 +- 0.0424
  EXPECT_NEAR(interval.low, 0.25 - 0.0424, 0.006);
  EXPECT_NEAR(interval.high, 0.25 + 0.0424, 0.006);
  EXPECT_EQ(bootstrap_mean(values, 1, 7).low, interval.low);
  EXPECT_NE(bootstrap_mean(values, 1, 8).low, interval.low);
  // Blocks of one whole period are all alike: nothing left to vary.
  EXPECT_DOUBLE_EQ(bootstrap_mean(values, 4, 7).low, 0.25);
  EXPECT_DOUBLE_EQ(bootstrap_mean(std::vector<double>{2}, 1, 0).high, 2);
}

TEST(Windows, AreThoseOfLlamaPerplexity) {
  std::vector<std::int32_t> tokens(35);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<std::int32_t>(100 + i);
  }
  const auto windows = cut_windows(tokens, 10, 0, 1);
  ASSERT_TRUE(windows);
  ASSERT_EQ(windows->size(), 3u);  // the rest is too short
  const Window& second = (*windows)[1];
  EXPECT_EQ(second.tokens[0], 1);  // BOS instead of 110
  EXPECT_EQ(second.tokens[1], 111);
  EXPECT_EQ(second.first_scored, 5u);
  EXPECT_EQ(second.n_scored(), 4u);
  EXPECT_EQ(second.target(5), 116);
  EXPECT_EQ(second.target(8), 119);
  EXPECT_EQ(cut_windows(tokens, 10, 2, -1).value().size(), 2u);
  EXPECT_EQ(cut_windows(tokens, 10, 0, -1).value()[2].tokens[0], 120);
  EXPECT_FALSE(cut_windows(tokens, 36, 0, -1));
}

TEST(Windows, OfTheRestOfAText) {
  const std::vector<std::int32_t> tokens(35);
  EXPECT_EQ(skip_windows(tokens, 10, 0).size(), 35u);
  EXPECT_EQ(skip_windows(tokens, 10, 1).size(), 25u);
  EXPECT_EQ(skip_windows(tokens, 10, 33).size(), 25u);
  EXPECT_EQ(skip_windows(tokens, 10, 34).size(), 15u);
  EXPECT_EQ(skip_windows(tokens, 10, 99).size(), 5u);  // for cut_windows() to complain about
  EXPECT_EQ(skip_windows(tokens, 36, 50).size(), 35u);
}

TEST(Divergence, KnownDistributions) {
  const std::vector<float> base{std::log(0.5f), std::log(0.25f), std::log(0.25f)};
  const std::vector<float> other{std::log(0.25f) + 3, std::log(0.5f) + 3, std::log(0.25f) + 3};
  ReferenceRows reference(1, 3);
  reference.store(0, base.data());
  EXPECT_NEAR(reference.log_prob(0, 1), std::log(0.25), 1e-4);
  const PositionResult same = compare(base.data(), reference, 0, 0);
  EXPECT_NEAR(same.kld, 0, 1e-4);
  EXPECT_NEAR(same.nll, std::log(2.0), 1e-6);
  EXPECT_TRUE(same.same_top);
  const PositionResult moved = compare(other.data(), reference, 0, 1);
  EXPECT_NEAR(moved.kld, 0.5 * std::log(2.0) - 0.25 * std::log(2.0), 1e-4);
  EXPECT_NEAR(moved.nll, std::log(2.0), 1e-5);
  EXPECT_NEAR(moved.p_diff, 0.25, 1e-4);
  EXPECT_FALSE(moved.same_top);
}

TEST(Divergence, FlatLogits) {
  const std::vector<float> flat(5, 2.0f);
  ReferenceRows reference(1, 5);
  reference.store(0, flat.data());
  const PositionResult result = compare(flat.data(), reference, 0, 4);
  EXPECT_NEAR(result.kld, 0, 1e-6);
  EXPECT_NEAR(result.nll_base, std::log(5.0), 1e-5);
}

TEST(Divergence, SummarySumsUp) {
  std::vector<PositionResult> positions;
  for (int i = 0; i < 1000; ++i) {
    positions.push_back({.nll = 2.0f + float(i % 2),
                         .nll_base = 2.0f,
                         .kld = float(i) / 1000,
                         .p_diff = i % 2 == 0 ? 0.1f : -0.1f,
                         .same_top = i % 4 != 0});
  }
  const DivergenceSummary summary = summarize(positions);
  EXPECT_NEAR(summary.ppl.mean, std::exp(2.5), 1e-6);
  EXPECT_NEAR(summary.ppl_base.mean, std::exp(2.0), 1e-6);
  EXPECT_NEAR(summary.ln_ppl_ratio.mean, 0.5, 1e-9);
  EXPECT_NEAR(summary.ln_ppl_ratio.error, 0.5 / std::sqrt(999.0), 1e-9);
  EXPECT_NEAR(summary.kld.mean, 0.4995, 1e-6);
  EXPECT_NEAR(percentile(summary.sorted_kld, 0.5), 0.4995, 1e-6);
  EXPECT_NEAR(summary.p_diff_rms.mean, 0.1, 1e-6);
  EXPECT_NEAR(summary.same_top.mean, 0.75, 1e-9);
  const std::string text = to_text(summary);
  EXPECT_NE(text.find("Mean PPL(Q)                   :  12.182494 ±"), std::string::npos) << text;
  EXPECT_NE(text.find("Median  KLD:   0.499500\n"), std::string::npos) << text;
  EXPECT_NE(text.find("Same top p: 75.000 ± 1.370 %\n"), std::string::npos) << text;
}

}  // namespace
}  // namespace zipcache::eval
