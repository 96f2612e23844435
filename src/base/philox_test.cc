// Known answers of Philox4x32-10 as published with the algorithm (Random123, kat_vectors).
#include "base/philox.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace zipcache {
namespace {

using Words = std::array<std::uint32_t, 4>;

TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, AStreamWalksItsCounter) {
  const std::uint64_t seed = 0x0123456789abcdef;
  Philox stream(seed, 5, 9);
  for (std::uint32_t block = 0; block < 3; ++block) {
    for (const std::uint32_t word : philox4x32({block, 0, 5, 9}, {0x89abcdef, 0x01234567})) {
      EXPECT_EQ(stream.next(), word);
    }
  }
}

TEST(Philox, NamesOfStreamsMatter) {
  const std::set<std::uint32_t> first{Philox(1, 2, 3).next(), Philox(2, 2, 3).next(),
                                      Philox(1, 3, 3).next(), Philox(1, 2, 4).next(),
                                      Philox(1ull << 32, 2, 3).next()};
  EXPECT_EQ(first.size(), 5u);
  EXPECT_EQ(Philox(1, 2, 3).next(), Philox(1, 2, 3).next());
}

TEST(Philox, BelowIsInRangeAndEven) {
  for (const std::uint32_t bound : {1u, 2u, 3u, 7u, 10u}) {
    Philox stream(bound, 0, 0);
    std::array<int, 10> counts{};
    constexpr int kDraws = 20'000;
    for (int draw = 0; draw < kDraws; ++draw) {
      const std::uint32_t value = stream.below(bound);
      ASSERT_LT(value, bound);
      ++counts[value];
    }
    const double expected = static_cast<double>(kDraws) / bound;
    for (std::uint32_t value = 0; value < bound; ++value) {
      EXPECT_NEAR(counts[value], expected, 6 * std::sqrt(expected)) << value << " of " << bound;
    }
  }
}

// With bound 3 * 2^30 a generator without rejection would favour every third value by 2 to 1.
TEST(Philox, BelowHasNoBiasForLargeBounds) {
  Philox stream(1, 0, 0);
  constexpr std::uint32_t kBound = 3u << 30;
  std::array<int, 3> counts{};
  for (int draw = 0; draw < 30'000; ++draw) {
    ++counts[stream.below(kBound) % 3];
  }
  for (const int count : counts) {
    EXPECT_NEAR(count, 10'000, 600);
  }
}

}  // namespace
}  // namespace zipcache
