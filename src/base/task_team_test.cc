#include "base/task_team.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

namespace zipcache {
namespace {

// One thread runs `lead` while the others help.
template <typename Lead>
void with_helpers(TaskTeam& team, int n_helpers, Lead&& lead) {
  team.start();
  std::vector<std::thread> helpers;
  for (int i = 0; i < n_helpers; ++i) {
    helpers.emplace_back([&] { team.help(); });
  }
  lead();
  team.finish();
  for (std::thread& helper : helpers) {
    helper.join();
  }
}

TEST(TaskTeamTest, DoesEachTaskOnceInEveryLoop) {
  TaskTeam team;
  for (const int n_helpers : {0, 1, 3}) {
    with_helpers(team, n_helpers, [&] {
      for (std::size_t n : {0, 1, 2, 7, 64}) {
        std::vector<int> counts(n, 0);  // no atomics: loops begin and end in order
        for (int loop = 0; loop < 50; ++loop) {
          team.for_each(n, [&](std::size_t i) { ++counts[i]; });
        }
        EXPECT_EQ(std::count(counts.begin(), counts.end(), 50), std::ptrdiff_t(n))
            << n << " tasks, " << n_helpers << " helpers";
      }
    });
  }
}

TEST(TaskTeamTest, ThrowsTheFailureOfATaskAndGoesOn) {
  TaskTeam team;
  with_helpers(team, 2, [&] {
    std::vector<int> done(16, 0);
    EXPECT_THROW(team.for_each(16,
                               [&](std::size_t i) {
                                 done[i] = 1;
                                 if (i % 5 == 0) {
                                   throw std::runtime_error("five");
                                 }
                               }),
                 std::runtime_error);
    EXPECT_EQ(std::accumulate(done.begin(), done.end(), 0), 16);
    int n = 0;
    team.for_each(1, [&](std::size_t) { ++n; });
    EXPECT_EQ(n, 1);
  });
}

TEST(TaskTeamTest, AloneIsInOrder) {
  std::vector<std::size_t> seen;
  for_each(nullptr, 3, [&](std::size_t i) { seen.push_back(i); });
  EXPECT_EQ(seen, (std::vector<std::size_t>{0, 1, 2}));
}

}  // namespace
}  // namespace zipcache
