#include "kernels/cuda/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "kernels/cuda/decode_config.h"

namespace zipcache::cuda {
namespace {

// What a token block is made of, one class after the other.
struct Mix {
  std::vector<PageClass> classes;
  std::vector<double> share;  // of the pages
  std::vector<int> set;       // of the token block's
  int n_sets;
  int last_tokens;  // of a class's last page
};
const Mix kTwoSets{{{4, 4}, {2, 2}}, {0.6, 0.4}, {0, 1}, 2, 17};
const Mix kUsual{{{4, 3}, {2, 3, 2, 4}, {2, 2, 2, 4}}, {0.25, 0.25, 0.5}, {0, 1, 1}, 2, 64};

// Rows of so many pages each, in so many token blocks.
struct Lists {
  std::vector<PageClass> classes;
  std::vector<PageEntry> pages;
  std::vector<std::int32_t> row_begin{0}, set_base;

  explicit Lists(const std::vector<int>& rows, int n_token_blocks = 1, const Mix& mix = kTwoSets)
      : classes(mix.classes) {
    for (const int n : rows) {
      set_base.push_back(static_cast<std::int32_t>(mix.n_sets * n_token_blocks * set_base.size()));
      for (int block = 0; block < n_token_blocks; ++block) {
        const int begin = n * block / n_token_blocks, end = n * (block + 1) / n_token_blocks;
        double share = 0;
        for (std::size_t cls = 0, page = begin; cls < classes.size(); ++cls) {
          share += mix.share[cls];
          const auto until = cls + 1 == classes.size()
                                 ? static_cast<std::size_t>(end)
                                 : begin + static_cast<std::size_t>((end - begin) * share);
          for (; page < until; ++page) {
            PageEntry entry;
            entry.unit = static_cast<std::uint32_t>(1000 + pages.size());
            entry.cls = static_cast<std::uint8_t>(cls);
            entry.set = static_cast<std::uint16_t>(mix.n_sets * block + mix.set[cls]);
            entry.tokens =
                static_cast<std::uint8_t>(page + 1 == until ? mix.last_tokens : kPageTokens);
            pages.push_back(entry);
          }
        }
      }
      row_begin.push_back(static_cast<std::int32_t>(pages.size()));
    }
  }
  PlanInput input(int resident_blocks) const {
    PlanInput in;
    in.head_dim = 128;
    in.n_kv_heads = 1;
    in.classes = classes;
    in.pages = pages;
    in.row_begin = row_begin;
    in.set_base = set_base;
    in.resident_blocks = resident_blocks;
    return in;
  }
};

// Every page exactly once, of one class per item, full up to the last; tails once per row,
// consistent slots, a block has a row only once. What a page takes was folded before, for it; each
// tile is the next warp's.
void check(const Lists& lists, const PlanInput& input, const DecodePlan& plan) {
  const int n_rows = static_cast<int>(lists.row_begin.size()) - 1;
  std::vector<int> seen(lists.pages.size()), tails(n_rows), parts(n_rows), announced(n_rows);
  std::set<int> slots;
  std::set<int> visited;
  const int warps = decode_warps(input.head_dim);
  for (int block = 0; block < plan.n_blocks; ++block) {
    std::set<int> rows;
    bool inside = false;
    int n_tiles = 0;
    const WorkItem* folded = nullptr;
    for (int at = block * kItemGroup; at >= 0; at = plan.items[at].next) {
      const WorkItem& item = plan.items[at];
      ASSERT_TRUE(visited.insert(at).second);
      ASSERT_TRUE(item.next < 0 || item.next % kItemGroup == 0 || item.next == at + 1);
      ASSERT_EQ(item.tile_bytes,
                item.n_pages > 0 ? tile_bytes(input.head_dim, item_class(item.bits)) : 0);
      folded = (item.bits & kItemFolds) != 0 ? &item : folded;
      ASSERT_TRUE(folded != nullptr && folded->row == item.row);
      ASSERT_LE(item_folds(folded->bits), max_folds(input.group));
      ASSERT_EQ(folded->first_set, lists.set_base[item.row]);
      int n_tokens = 0;
      for (int n = 0; n < item.n_pages; ++n) {
        const auto page = n < kItemPages
                              ? std::ranges::find(lists.pages, item.pages[n].unit, &PageEntry::unit)
                              : lists.pages.begin() + item.first_page + n;
        ASSERT_LT(page, lists.pages.end());
        const auto at_page = static_cast<int>(page - lists.pages.begin());
        ASSERT_GE(at_page, lists.row_begin[item.row]);
        ASSERT_LT(at_page, lists.row_begin[item.row + 1]);
        ASSERT_EQ(item.bits & 0xffff, item_class_bits(lists.classes[page->cls]));
        ASSERT_TRUE(page->tokens == kPageTokens || n + 1 == item.n_pages);
        const int fold = warp_fold(item.page_folds, n * kTilesPerPage % warps);
        ASSERT_LT(fold, item_folds(folded->bits));
        ASSERT_EQ(folded->folds[fold].set, page->set);
        const PageClass cls = item_class(folded->folds[fold].bits), own = item_class(item.bits);
        ASSERT_EQ(cls.key_bits, own.key_bits);
        ASSERT_EQ(cls.wide_chunks, own.wide_chunks);
        ASSERT_EQ(cls.wide_bits, own.wide_bits);
        n_tokens += page->tokens;
        ++seen[at_page];
      }
      ASSERT_EQ(item.n_tokens, n_tokens);
      ASSERT_TRUE(inside ? rows.contains(item.row) : rows.insert(item.row).second);
      inside = (item.bits & kItemEndsPart) == 0;
      tails[item.row] += (item.bits & kItemWithTail) != 0;
      announced[item.row] = item.n_partials > 0 ? item.n_partials : kClusterBlocks;
      if (item.n_partials == 0) {  // the only part of all blocks of the cluster
        ASSERT_EQ(plan.cluster_blocks, kClusterBlocks);
        ASSERT_EQ(rows.size(), 1U);
        const int first = block / kClusterBlocks * kClusterBlocks;
        for (int other = first; other < first + kClusterBlocks; ++other) {
          ASSERT_EQ(plan.items[other * kItemGroup].row, item.row);
          ASSERT_EQ(plan.items[other * kItemGroup].n_partials, 0);
        }
      }
      parts[item.row] += !inside;
      if ((item.bits & kItemWithTail) != 0) {
        const int tail = item.bits >> kItemTailFoldShift & kFoldMask;
        ASSERT_EQ(tail, item_folds(folded->bits) - 1);
        ASSERT_LT(tail, max_folds(input.group));
        ASSERT_EQ(folded->folds[tail].bits, item_class_bits(kTailClass));
      }
      for (int warp = 0; warp < warps; ++warp) {
        ASSERT_EQ(first_tile_of_warp(input.head_dim, item.bits, (n_tiles + warp) % warps), warp);
      }
      n_tiles += item.n_pages * kTilesPerPage;
      ASSERT_EQ(item.sequence, item.row);
      folded = inside ? folded : nullptr;
      if (item.n_partials > 1 && !inside) {
        ASSERT_TRUE(slots.insert(item.partial).second);
        ASSERT_GE(item.partial, item.first_partial);
        ASSERT_LT(item.partial, item.first_partial + item.n_partials);
        ASSERT_LT(item.partial, plan.n_partials);
      }
    }
    ASSERT_FALSE(inside);
  }
  ASSERT_EQ(plan.items.size() % kItemGroup, 0U);
  for (std::size_t at = 0; at < plan.items.size(); ++at) {
    ASSERT_TRUE(visited.contains(static_cast<int>(at)) || plan.items[at].n_pages == 0);
  }
  EXPECT_EQ(seen, std::vector<int>(seen.size(), 1));
  EXPECT_EQ(tails, std::vector<int>(n_rows, 1));
  EXPECT_EQ(parts, announced);
  EXPECT_EQ(static_cast<int>(slots.size()), plan.n_partials);
}

TEST(Plan, BlocksWithoutWorkHaveNoPagesAndEndNothing) {
  const Lists lists({10, 3});
  PlanInput input = lists.input(4);
  const DecodePlan plan = plan_decode(input);
  input.n_blocks = 50;
  const DecodePlan padded = plan_decode(input);
  ASSERT_LT(plan.n_blocks, 50);
  ASSERT_EQ(padded.n_blocks, 50);
  ASSERT_EQ(padded.items.size(), plan.items.size() + std::size_t(50 - plan.n_blocks) * kItemGroup);
  for (int block = 0; block < 50; ++block) {
    const WorkItem& item = padded.items[block * kItemGroup];
    if (block < plan.n_blocks) {
      EXPECT_EQ(item.first_page, plan.items[block * kItemGroup].first_page);
    } else {
      EXPECT_EQ(item.n_pages, 0);
      EXPECT_EQ(item.next, -1);
      EXPECT_EQ(item.bits, 0);
    }
  }
  input.n_blocks = 1;  // fewer than there is work for
  EXPECT_EQ(plan_decode(input).n_blocks, plan.n_blocks);
}

TEST(Plan, CoversEverythingOnce) {
  for (const std::vector<int>& rows : {std::vector<int>{0},
                                       {1},
                                       {0, 0, 5},
                                       {0, 0, 0, 0},
                                       {500, 1, 0, 37},
                                       std::vector<int>(64, 100),
                                       std::vector<int>(8, 512),
                                       {1, 2, 3, 4, 5, 6, 7, 8, 9, 2000}}) {
    for (const int resident_blocks : {1, 2, 7, 132, 528}) {
      const Lists lists(rows);
      SCOPED_TRACE(resident_blocks);
      PlanInput input = lists.input(resident_blocks);
      check(lists, input, plan_decode(input));
      input.resident_clusters = resident_blocks / kClusterBlocks;
      input.min_block_bytes = input.part_bytes = 1 << 10;  // many blocks, also of small work
      check(lists, input, plan_decode(input));
    }
  }
}

TEST(Plan, FoldsOfManySetsFit) {
  for (const Mix& mix : {kTwoSets, kUsual}) {
    for (const int group : {1, 4, 5, 8}) {
      for (const int head_dim : {64, 128, 256}) {
        const Lists lists({40, 8, 100, 0, 23}, 10, mix);
        PlanInput input = lists.input(3);
        input.group = group;
        input.head_dim = head_dim;
        const DecodePlan plan = plan_decode(input);
        check(lists, input, plan);
        const auto folds = std::ranges::count_if(
            plan.items, [](const WorkItem& item) { return (item.bits & kItemFolds) != 0; });
        EXPECT_GT(folds, plan.n_blocks);  // some block's sets are more than fit
      }
    }
  }
}

// (class, pages) of a row's items.
std::vector<std::pair<int, int>> items_of(const Lists& lists, const DecodePlan& plan) {
  std::vector<std::pair<int, int>> items;
  for (int at = 0; at >= 0; at = plan.items[at].next) {
    const auto cls =
        std::ranges::find(lists.classes, plan.items[at].bits & 0xffff, item_class_bits);
    items.emplace_back(cls - lists.classes.begin(), plan.items[at].n_pages);
  }
  return items;
}

TEST(Plan, ShortRunsShareItemsOfTheirClass) {
  using Items = std::vector<std::pair<int, int>>;
  const auto items_of_row = [](int n_pages, int n_token_blocks, int head_dim) {
    const Lists lists({n_pages}, n_token_blocks, kUsual);
    PlanInput input = lists.input(1);
    input.head_dim = head_dim;
    const DecodePlan plan = plan_decode(input);
    check(lists, input, plan);
    return items_of(lists, plan);
  };
  // Token blocks of 2, 2 and 4 pages; the only block of threads begins with the last class.
  EXPECT_EQ(items_of_row(32, 4, 128), (Items{{2, 8}, {2, 8}, {1, 8}, {0, 8}}));
  EXPECT_EQ(items_of_row(32, 4, 256),
            (Items{{2, 4}, {2, 4}, {2, 4}, {2, 4}, {1, 4}, {1, 4}, {0, 4}, {0, 4}}));
  // Two of them: pairs come apart so that every warp has a page.
  EXPECT_EQ(items_of_row(16, 2, 128), (Items{{2, 8}, {1, 4}, {0, 4}}));
  // Three of 1, 1 and 3, of which each has a pair and a page without another.
  EXPECT_EQ(items_of_row(15, 3, 128), (Items{{2, 7}, {2, 2}, {1, 3}, {0, 3}}));
  // One block: runs.
  EXPECT_EQ(items_of_row(64, 1, 128), (Items{{2, 32}, {1, 16}, {0, 16}}));
}

// Cost of every block, as the planner counts it.
std::vector<std::int64_t> costs(const PlanInput& input, const DecodePlan& plan) {
  std::vector<std::int64_t> all(plan.n_blocks);
  for (int block = 0; block < plan.n_blocks; ++block) {
    for (int at = block * kItemGroup; at >= 0; at = plan.items[at].next) {
      const std::uint32_t bits = plan.items[at].bits;
      all[block] += (page_bytes(input.head_dim, item_class(bits)) +
                     kTilesPerPage * std::int64_t{input.tile_bytes}) *
                        plan.items[at].n_pages +
                    ((bits & kItemEndsPart) != 0 ? input.part_bytes : 0);
    }
  }
  return all;
}

TEST(Plan, LongRowsInWholePieces) {
  const Lists lists(std::vector<int>(64, 512));
  const PlanInput input = lists.input(264);
  const DecodePlan plan = plan_decode(input);
  EXPECT_EQ(plan.n_blocks, 256);  // 4.1 blocks per row: 4
  EXPECT_EQ(plan.n_partials, 256);
  const std::vector<std::int64_t> all = costs(input, plan);
  const auto [low, high] = std::ranges::minmax_element(all);
  const int tail = input.tail_bytes + input.tail_tokens * 128 * 4;
  EXPECT_LT(*high - *low, 2 * page_bytes(128, {4, 4}) + tail);
  // And of each class an equal share, in half of the blocks the other way round.
  for (int block = 0; block < plan.n_blocks; ++block) {
    const WorkItem* wide = &plan.items[block * kItemGroup];
    const WorkItem* narrow = &plan.items[wide->next];
    ASSERT_EQ(narrow->partial, wide->partial);
    if (block >= plan.n_blocks / 2) {
      std::swap(wide, narrow);
    }
    ASSERT_NEAR(wide->n_pages, 512 * 0.6 / 4, 1);
    const int page = page_bytes(128, {2, 2}) + kTilesPerPage * input.tile_bytes;
    const int tail_pages = tail / page;  // one has the tail too
    ASSERT_NEAR(narrow->n_pages, 512 * 0.4 / 4, tail_pages + 1);
  }
}

TEST(Plan, RowsOfFourBlocksInClusters) {
  const Lists lists(std::vector<int>(64, 512));
  PlanInput input = lists.input(264);
  EXPECT_EQ(plan_decode(input).cluster_blocks, 1);
  input.resident_clusters = 63;  // not all of them
  EXPECT_EQ(plan_decode(input).cluster_blocks, 1);
  input.resident_clusters = 66;
  const DecodePlan plan = plan_decode(input);
  check(lists, input, plan);
  EXPECT_EQ(plan.cluster_blocks, kClusterBlocks);
  EXPECT_EQ(plan.n_partials, 0);
  input.n_blocks = 262;
  EXPECT_EQ(plan_decode(input).n_blocks, 264);
  // Of blocks that may share an SM at most one has a tail, and each begins with another class.
  const auto ends_with_tail = [&](int block) {
    int at = block * kItemGroup;
    while (plan.items[at].next >= 0) {
      at = plan.items[at].next;
    }
    return (plan.items[at].bits & kItemWithTail) != 0;
  };
  for (int block = 0; block < 128; ++block) {
    EXPECT_FALSE(ends_with_tail(block) && ends_with_tail(block + 128));
    EXPECT_NE(plan.items[block * kItemGroup].bits & 0xffff,
              plan.items[(block + 128) * kItemGroup].bits & 0xffff);
  }
}

TEST(Plan, RowsOfSeveralClustersHaveNone) {
  const Lists lists(std::vector<int>(8, 512));
  PlanInput input = lists.input(264);
  input.resident_clusters = 66;
  const DecodePlan plan = plan_decode(input);
  check(lists, input, plan);
  EXPECT_EQ(plan.cluster_blocks, 1);
}

TEST(Plan, TailsOfFewRowsStandApart) {
  for (const int pages : {64, 512}) {
    const Lists lists(std::vector<int>(8, pages));
    const PlanInput input = lists.input(264);
    const DecodePlan plan = plan_decode(input);
    check(lists, input, plan);
    EXPECT_LE(plan.n_blocks, 264);
    int n_tails = 0;
    for (const WorkItem& item : plan.items) {
      if ((item.bits & kItemWithTail) != 0) {
        EXPECT_EQ(item.n_pages, 0);
        EXPECT_GT(item.n_partials, 1);
        ++n_tails;
      }
    }
    EXPECT_EQ(n_tails, 8);
  }
}

TEST(Plan, ShortRowsWhole) {
  const Lists lists(std::vector<int>(512, 64));
  const DecodePlan plan = plan_decode(lists.input(264));
  EXPECT_LE(plan.n_blocks, 264);
  EXPECT_EQ(plan.n_partials, 0);
}

TEST(Plan, RowsOfOddLengthInEqualCuts) {
  const Lists lists({4000, 10, 700, 3, 1111});
  const PlanInput input = lists.input(132);
  const DecodePlan plan = plan_decode(input);
  const std::vector<std::int64_t> all = costs(input, plan);
  const std::int64_t total = std::accumulate(all.begin(), all.end(), std::int64_t{0});
  EXPECT_LT(*std::ranges::max_element(all), total / plan.n_blocks * 5 / 4);
}

TEST(Plan, SmallWorkTakesFewBlocks) {
  const Lists lists({1});
  EXPECT_EQ(plan_decode(lists.input(528)).n_blocks, 1);
}

}  // namespace
}  // namespace zipcache::cuda
