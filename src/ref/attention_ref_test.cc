#include "ref/attention_ref.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace zipcache::ref {
namespace {

// One row, two heads over one key-value head, two tokens, one channel; logits ln 1, ln 3 for head 0
// and ln 1, ln 9 for head 1.
struct Small {
  float ln3 = std::log(3.0f);
  std::vector<float> q{1, 2}, k{0, ln3}, v{10, 20};
  AttentionCase make() const {
    AttentionCase c;
    c.n_rows = 1;
    c.n_heads = 2;
    c.n_tokens = 2;
    c.n_kv_heads = c.key_dim = c.value_dim = 1;
    c.q = q;
    c.k = k;
    c.v = v;
    return c;
  }
};

constexpr double kBound = 1e-6;

TEST(AttentionRef, WorkedByHand) {
  const Small small;
  const AttentionResult got = attention(small.make(), true);
  EXPECT_NEAR(got.out[0], 17.5, kBound);  // (1 * 10 + 3 * 20) / 4
  EXPECT_NEAR(got.out[1], 19.0, kBound);  // (1 * 10 + 9 * 20) / 10
  EXPECT_NEAR(got.lse[0], std::log(4.0), kBound);
  EXPECT_NEAR(got.lse[1], std::log(10.0), kBound);
  EXPECT_NEAR(got.weights[0], .25, kBound);
  EXPECT_NEAR(got.weights[3], .9, kBound);
}

TEST(AttentionRef, HiddenTokensWeighNothingEvenIfTheyAreNan) {
  Small small;
  small.v[1] = std::numeric_limits<float>::quiet_NaN();
  small.k[1] = std::numeric_limits<float>::infinity();
  AttentionCase c = small.make();
  const std::vector<std::uint8_t> visible{1, 0};
  c.visible = visible;
  const AttentionResult got = attention(c, true);
  EXPECT_EQ(got.out[0], 10);
  EXPECT_EQ(got.lse[0], 0);
  EXPECT_EQ(got.weights[1], 0);
}

TEST(AttentionRef, ARowThatSeesNothingIsZero) {
  const Small small;
  AttentionCase c = small.make();
  const std::vector<std::uint8_t> visible{0, 0};
  c.visible = visible;
  const AttentionResult got = attention(c);
  EXPECT_EQ(got.out[0], 0);
  EXPECT_EQ(got.lse[0], -std::numeric_limits<double>::infinity());
  EXPECT_TRUE(got.weights.empty());
}

TEST(AttentionRef, ASinkTakesWeightAndGivesNoValue) {
  const Small small;
  AttentionCase c = small.make();
  const std::vector<float> sinks{std::log(4.0f), std::log(10.0f)};
  c.sinks = sinks;
  const AttentionResult got = attention(c);
  EXPECT_NEAR(got.out[0], 17.5 / 2, kBound);
  EXPECT_NEAR(got.lse[0], std::log(8.0), kBound);
  EXPECT_NEAR(got.out[1], 19.0 / 2, kBound);
}

TEST(AttentionRef, SoftcapBoundsTheScoreButNotTheBias) {
  const Small small;
  AttentionCase c = small.make();
  c.softcap = 0.5;
  const std::vector<float> bias{1, 0}, slopes{2, 0.5f};
  c.bias = bias;
  c.slopes = slopes;
  const AttentionResult got = attention(c);
  for (int head = 0; head < 2; ++head) {
    const double capped = 0.5 * std::tanh((head + 1) * std::log(3.0) / 0.5);
    const double first = std::exp(1.0 * slopes[head]), second = std::exp(capped);
    EXPECT_NEAR(got.out[head], (10 * first + 20 * second) / (first + second), kBound);
  }
}

TEST(AttentionRef, HeadsOfAGroupShareKeysAndCausalRowsSeeTheirPast) {
  EXPECT_EQ(causal_mask(2, 4, 1), (std::vector<std::uint8_t>{1, 1, 0, 0, 1, 1, 1, 0}));
  AttentionCase c;
  c.n_rows = 1;
  c.n_heads = 4;
  c.n_kv_heads = 2;
  c.n_tokens = 1;
  c.key_dim = c.value_dim = 1;
  const std::vector<float> q{1, 1, 1, 1}, k{0, 0}, v{5, 7};
  c.q = q;
  c.k = k;
  c.v = v;
  EXPECT_EQ(attention(c).out, (std::vector<double>{5, 5, 7, 7}));
}

}  // namespace
}  // namespace zipcache::ref
