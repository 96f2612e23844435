#include "kernels/cuda/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

namespace zipcache::cuda {
namespace {

// Rows of `pages` pages each: the first part of class 0 (4 bits), the rest of class 1 (2 bits).
struct Lists {
  std::vector<PageClass> classes{{4, 4}, {2, 2}};
  std::vector<PageEntry> pages;
  std::vector<std::int32_t> row_begin{0};

  explicit Lists(const std::vector<int>& rows) {
    for (const int n : rows) {
      for (int page = 0; page < n; ++page) {
        PageEntry entry;
        entry.tokens = kPageTokens;
        entry.cls = page < n * 6 / 10 ? 0 : 1;
        pages.push_back(entry);
      }
      row_begin.push_back(static_cast<std::int32_t>(pages.size()));
    }
  }
  PlanInput input(int max_blocks) const {
    PlanInput in;
    in.head_dim = 128;
    in.classes = classes;
    in.pages = pages;
    in.row_begin = row_begin;
    in.max_blocks = max_blocks;
    return in;
  }
};

// Every page exactly once, tails once per row, consistent slots, blocks that hold one row only
// once.
void check(const Lists& lists, const DecodePlan& plan) {
  const int n_rows = static_cast<int>(lists.row_begin.size()) - 1;
  std::vector<int> seen(lists.pages.size()), tails(n_rows), parts(n_rows), announced(n_rows);
  std::set<int> slots;
  std::set<int> visited;
  for (int block = 0; block < plan.n_blocks; ++block) {
    std::set<int> rows;
    for (int at = block; at >= 0; at = plan.items[at].next) {
      const WorkItem& item = plan.items[at];
      ASSERT_TRUE(visited.insert(at).second);
      if (item.row < 0) {
        ASSERT_EQ(item.next, -1);
        continue;
      }
      ASSERT_TRUE(rows.insert(item.row).second);
      ASSERT_GE(item.first_page, lists.row_begin[item.row]);
      ASSERT_LE(item.first_page + item.n_pages, lists.row_begin[item.row + 1]);
      for (int page = 0; page < item.n_pages; ++page) {
        ++seen[item.first_page + page];
      }
      tails[item.row] += item.with_tail;
      ++parts[item.row];
      announced[item.row] = item.n_partials;
      if (item.n_partials > 1) {
        ASSERT_TRUE(slots.insert(item.partial).second);
        ASSERT_GE(item.partial, item.first_partial);
        ASSERT_LT(item.partial, item.first_partial + item.n_partials);
        ASSERT_LT(item.partial, plan.n_partials);
      }
    }
  }
  EXPECT_EQ(visited.size(), plan.items.size());
  EXPECT_EQ(seen, std::vector<int>(seen.size(), 1));
  EXPECT_EQ(tails, std::vector<int>(n_rows, 1));
  EXPECT_EQ(parts, announced);
  EXPECT_EQ(static_cast<int>(slots.size()), plan.n_partials);
}

TEST(Plan, CoversEverythingOnce) {
  for (const std::vector<int>& rows : {std::vector<int>{0},
                                       {1},
                                       {0, 0, 5},
                                       {500, 1, 0, 37},
                                       std::vector<int>(64, 100),
                                       std::vector<int>(8, 512),
                                       {1, 2, 3, 4, 5, 6, 7, 8, 9, 2000}}) {
    for (const int max_blocks : {1, 2, 7, 132, 528}) {
      const Lists lists(rows);
      SCOPED_TRACE(max_blocks);
      check(lists, plan_decode(lists.input(max_blocks)));
    }
  }
}

TEST(Plan, BlocksCarryEqualBytes) {
  const Lists lists(std::vector<int>(64, 512));
  const DecodePlan plan = plan_decode(lists.input(528));
  ASSERT_EQ(plan.n_blocks, 528);
  std::vector<std::int64_t> bytes(plan.n_blocks);
  for (int block = 0; block < plan.n_blocks; ++block) {
    for (int at = block; at >= 0; at = plan.items[at].next) {
      for (int page = 0; page < plan.items[at].n_pages; ++page) {
        const PageClass cls = lists.classes[lists.pages[plan.items[at].first_page + page].cls];
        bytes[block] += page_bytes(128, cls.key_bits, cls.value_bits);
      }
    }
  }
  const auto [low, high] = std::minmax_element(bytes.begin(), bytes.end());
  EXPECT_LT(*high - *low, 3 * page_bytes(128, 4, 4) + 64 * 512);  // a page each way, one tail
}

TEST(Plan, SmallWorkTakesFewBlocks) {
  const Lists lists({1});
  EXPECT_EQ(plan_decode(lists.input(528)).n_blocks, 1);
}

}  // namespace
}  // namespace zipcache::cuda
