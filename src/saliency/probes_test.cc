#include "saliency/probes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <set>

namespace zipcache::saliency {
namespace {

using Rows = std::vector<std::uint32_t>;

constexpr std::array kLengths{0u, 1u, 2u, 19u, 20u, 21u, 64u, 65u, 100u, 256u, 512u, 2048u, 32768u};
constexpr std::array kRules{ProbeRule::kDefault, ProbeRule::kOfficial, ProbeRule::kAll,
                            ProbeRule::kRecent,  ProbeRule::kRandom,   ProbeRule::kLast};

Rows every_row(std::uint32_t n_rows) {
  Rows rows(n_rows);
  for (std::uint32_t row = 0; row < n_rows; ++row) {
    rows[row] = row;
  }
  return rows;
}

// How many of the newest rows are probes without a gap.
std::size_t newest_run(const Rows& probes, std::uint32_t n_rows) {
  const std::set<std::uint32_t> set(probes.begin(), probes.end());
  std::size_t run = 0;
  while (run < n_rows && set.contains(n_rows - 1 - static_cast<std::uint32_t>(run))) {
    ++run;
  }
  return run;
}

TEST(Probes, AreAscendingRowsAndUniqueUnlessOfficial) {
  for (const ProbeRule rule : kRules) {
    for (const std::uint32_t n_rows : kLengths) {
      SCOPED_TRACE(testing::Message() << "rule " << static_cast<int>(rule) << " L " << n_rows);
      const Rows probes = select_probes(rule, n_rows, {.seed = 1, .layer = 2, .ordinal = 3});
      EXPECT_TRUE(std::is_sorted(probes.begin(), probes.end()));
      if (rule != ProbeRule::kOfficial) {
        EXPECT_EQ(std::adjacent_find(probes.begin(), probes.end()), probes.end());
      }
      EXPECT_EQ(probes.empty(), n_rows == 0);
      if (n_rows > 0) {
        EXPECT_LT(probes.back(), n_rows);
        if (rule != ProbeRule::kRandom) {
          EXPECT_EQ(probes.back(), n_rows - 1);
        }
      }
    }
  }
}

struct Count {
  std::uint32_t n_rows;
  std::size_t n_recent;
  std::size_t n_random;
};

TEST(Probes, DefaultTakesOneTwentiethOfTheNewestAndOfTheOthers) {
  constexpr std::array<Count, 8> kCounts{{{65, 16, 16},
                                          {100, 16, 16},
                                          {256, 16, 16},
                                          {320, 16, 16},
                                          {321, 17, 16},
                                          {512, 26, 25},
                                          {2048, 103, 102},
                                          {32768, 1639, 1638}}};
  for (const auto& [n_rows, n_recent, n_random] : kCounts) {
    const Rows probes = select_probes(ProbeRule::kDefault, n_rows, {});
    EXPECT_EQ(probes.size(), n_recent + n_random) << n_rows;
    EXPECT_GE(newest_run(probes, n_rows), n_recent) << n_rows;
    EXPECT_EQ(std::count_if(probes.begin(), probes.end(),
                            [&, first = n_rows - n_recent](auto row) { return row < first; }),
              static_cast<std::ptrdiff_t>(n_random))
        << n_rows;
  }
}

TEST(Probes, ShortChunksAreProbedWhole) {
  for (const std::uint32_t n_rows : {1u, 2u, 19u, 20u, 21u, 64u}) {
    for (const ProbeRule rule :
         {ProbeRule::kDefault, ProbeRule::kRecent, ProbeRule::kRandom, ProbeRule::kAll}) {
      EXPECT_EQ(select_probes(rule, n_rows, {}), every_row(n_rows)) << n_rows;
    }
  }
}

TEST(Probes, OfficialCountsAreThoseOfThePublishedCode) {
  // L - int(L - .05 * L) newest and int(.05 * L) random, evaluated in Python.
  constexpr std::array<Count, 11> kCounts{{{1, 1, 0},
                                           {2, 1, 0},
                                           {19, 1, 0},
                                           {20, 1, 1},
                                           {21, 2, 1},
                                           {64, 4, 3},
                                           {65, 4, 3},
                                           {100, 5, 5},
                                           {256, 13, 12},
                                           {512, 26, 25},
                                           {2048, 103, 102}}};
  for (const auto& [n_rows, n_recent, n_random] : kCounts) {
    const Rows probes = select_probes(ProbeRule::kOfficial, n_rows, {.seed = 7});
    ASSERT_EQ(probes.size(), n_recent + n_random) << n_rows;
    EXPECT_TRUE(n_random == 0 || probes[n_random - 1] < n_rows - n_recent) << n_rows;
    EXPECT_EQ(probes[n_random], n_rows - n_recent) << n_rows;
  }
}

TEST(Probes, OfficialDrawsWithReplacement) {
  bool repeated = false;
  for (std::uint32_t ordinal = 0; ordinal < 20 && !repeated; ++ordinal) {
    const Rows probes = select_probes(ProbeRule::kOfficial, 2048, {.ordinal = ordinal});
    repeated = std::adjacent_find(probes.begin(), probes.end()) != probes.end();
  }
  EXPECT_TRUE(repeated);  // 102 draws of 1945 rows repeat one with probability 0.93
}

TEST(Probes, OneKindOfRowsOnly) {
  EXPECT_EQ(select_probes(ProbeRule::kAll, 300, {}), every_row(300));
  EXPECT_EQ(select_probes(ProbeRule::kLast, 300, {}), Rows{299});
  const Rows recent = select_probes(ProbeRule::kRecent, 2048, {});
  EXPECT_EQ(recent.size(), 205u);
  EXPECT_EQ(recent.front(), 2048u - 205u);
  const Rows random = select_probes(ProbeRule::kRandom, 2048, {});
  EXPECT_EQ(random.size(), 205u);
  EXPECT_LT(random.front(), 200u);  // reaches the oldest rows
  EXPECT_LT(newest_run(random, 2048), 20u);
}

TEST(Probes, EveryOtherRowIsDrawnAboutAsOften) {
  constexpr std::uint32_t kRows = 100;  // 16 newest, 16 random of 84
  constexpr std::uint32_t kRounds = 2100;
  std::array<int, kRows> drawn{};
  for (std::uint32_t round = 0; round < kRounds; ++round) {
    for (const std::uint32_t row : select_probes(ProbeRule::kDefault, kRows, {.ordinal = round})) {
      ++drawn[row];
    }
  }
  for (std::uint32_t row = 0; row < kRows - 16; ++row) {
    EXPECT_NEAR(drawn[row], 400, 90) << row;  // binomial, standard deviation 18
  }
}

TEST(Probes, DependOnTheKeyAndOnNothingElse) {
  for (const ProbeRule rule : {ProbeRule::kDefault, ProbeRule::kOfficial, ProbeRule::kRandom}) {
    const Rows probes = select_probes(rule, 512, {.seed = 1, .layer = 2, .ordinal = 3});
    EXPECT_EQ(probes, select_probes(rule, 512, {.seed = 1, .layer = 2, .ordinal = 3}));
    EXPECT_NE(probes, select_probes(rule, 512, {.seed = 9, .layer = 2, .ordinal = 3}));
    EXPECT_NE(probes, select_probes(rule, 512, {.seed = 1, .layer = 9, .ordinal = 3}));
    EXPECT_NE(probes, select_probes(rule, 512, {.seed = 1, .layer = 2, .ordinal = 9}));
  }
}

// From a Python implementation of Philox4x32-10, Lemire's bounds and the shuffle. A change here
// changes every stored result.
TEST(Probes, GoldenDraws) {
  const Rows probes = select_probes(ProbeRule::kDefault, 80, {.seed = 42, .layer = 1});
  EXPECT_EQ(Rows(probes.begin(), probes.begin() + 16),
            (Rows{0, 2, 7, 8, 11, 12, 15, 16, 18, 19, 24, 28, 33, 46, 47, 63}));
}

TEST(Probes, SpecialRowsAreThoseOfTheirPositions) {
  const std::vector<std::uint32_t> special{0, 3, 99, 100, 163, 164};
  const auto rows = [&](std::uint32_t n_rows, std::uint32_t ordinal) {
    return select_probes(ProbeRule::kSpecial, n_rows, {.ordinal = ordinal, .special = special});
  };
  EXPECT_EQ(rows(100, 0), (Rows{0, 3, 99}));
  EXPECT_EQ(rows(64, 100), (Rows{0, 63}));
  EXPECT_EQ(rows(1, 164), Rows{0});
  EXPECT_EQ(rows(1, 165), Rows{});
}

}  // namespace
}  // namespace zipcache::saliency
