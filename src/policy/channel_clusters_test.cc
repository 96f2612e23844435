#include "policy/channel_clusters.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <random>

namespace zipcache::policy {
namespace {

// Squared distances of all channels from the means of their clusters, written out.
double spread(const std::vector<std::uint16_t>& order, std::span<const float> low,
              std::span<const float> high, std::size_t size) {
  double sum = 0;
  for (std::size_t begin = 0; begin < order.size(); begin += size) {
    for (const std::span<const float> axis : {low, high}) {
      double mean = 0;
      for (std::size_t i = begin; i < begin + size; ++i) {
        mean += axis[order[i]] / double(size);
      }
      for (std::size_t i = begin; i < begin + size; ++i) {
        sum += (axis[order[i]] - mean) * (axis[order[i]] - mean);
      }
    }
  }
  return sum;
}

// The least spread of any split of few channels into two halves.
double least_spread(std::span<const float> low, std::span<const float> high) {
  const std::size_t n = low.size();
  double least = INFINITY;
  for (std::uint32_t chosen = 0; chosen < 1u << n; ++chosen) {
    std::vector<std::uint16_t> order;
    for (const bool first : {true, false}) {
      for (std::uint16_t c = 0; c < n; ++c) {
        if (((chosen >> c & 1) != 0) == first) {
          order.push_back(c);
        }
      }
    }
    if (std::popcount(chosen) == static_cast<int>(n / 2)) {
      least = std::min(least, spread(order, low, high, n / 2));
    }
  }
  return least;
}

TEST(ChannelClusters, FindsWhatIsApart) {
  // Three kinds of channels, interleaved; two of them have equal ranges in different places.
  std::vector<float> low, high;
  for (int c = 0; c < 48; ++c) {
    low.push_back(c % 3 == 0 ? -1.0f : c % 3 == 1 ? 7.0f : -20.0f);
    high.push_back(c % 3 == 0 ? 1.0f : c % 3 == 1 ? 9.0f : 20.0f + 0.01f * float(c));
  }
  const auto order = cluster_channels(low, high, 16);
  for (std::size_t i = 0; i < 48; ++i) {
    EXPECT_EQ(order[i] % 3, order[i / 16 * 16] % 3) << i;
    EXPECT_TRUE(i % 16 == 0 || order[i - 1] < order[i]) << i;
  }
}

TEST(ChannelClusters, IsNearTheBestSplitAndAlwaysAPermutation) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 50; ++round) {
    std::vector<float> low(12), high(12);
    for (std::size_t c = 0; c < low.size(); ++c) {
      low[c] = normal(random) - 1;
      high[c] = low[c] + std::abs(normal(random));
    }
    const auto order = cluster_channels(low, high, 6);
    auto sorted = order;
    std::sort(sorted.begin(), sorted.end());
    std::vector<std::uint16_t> all(12);
    std::iota(all.begin(), all.end(), std::uint16_t{0});
    EXPECT_EQ(sorted, all);
    EXPECT_EQ(order, cluster_channels(low, high, 6));
    EXPECT_LE(spread(order, low, high, 6), 1.1 * least_spread(low, high));
  }
}

TEST(ChannelClusters, KeepsTheOrderWhereThereIsNothingToChoose) {
  const std::vector<float> low(32, -1.0f), high(32, 1.0f);
  std::vector<std::uint16_t> all(32);
  std::iota(all.begin(), all.end(), std::uint16_t{0});
  for (const std::uint32_t size : {16u, 32u}) {
    EXPECT_EQ(cluster_channels(low, high, size), all);
  }
  EXPECT_TRUE(cluster_channels({}, {}, 16).empty());
  EXPECT_ANY_THROW(cluster_channels(low, high, 24));
}

}  // namespace
}  // namespace zipcache::policy
