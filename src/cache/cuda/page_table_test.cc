#include "cache/cuda/page_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

namespace zipcache::cuda {
namespace {

constexpr std::uint32_t kCells = 2048, kHeads = 2, kDim = 64;

policy::Policy make_policy(const std::map<std::string, std::string>& settings = {}) {
  const auto asked = policy::make_policy(settings);
  return *device_policy(*asked);
}

// One stream after the other, every row sees the tokens of its stream so far and itself.
class Engine {
 public:
  explicit Engine(std::uint32_t n_streams)
      : table_({.n_layers = 3,
                .n_streams = n_streams,
                .n_cells = kCells,
                .n_kv_heads = kHeads,
                .head_dim = kDim,
                .layer = 0},
               make_policy()),
        visible_(n_streams) {}

  // Tokens at the cells, of streams [first, first + n): the same cells in each.
  Expected<Step> step(std::uint32_t first, std::uint32_t n, const std::vector<int>& cells) {
    std::vector<std::int64_t> rows;
    std::vector<std::uint8_t> flags(std::size_t{n} * kCells);
    std::vector<std::int32_t> counts;
    for (std::uint32_t s = 0; s < n; ++s) {
      std::set<int>& seen = visible_[first + s];
      std::fill_n(flags.begin() + s * kCells, kCells, std::uint8_t{0});
      for (const int cell : seen) {
        flags[s * kCells + cell] = kSeenByAny | kSeenByAll;
      }
      for (const int cell : cells) {
        rows.push_back(std::int64_t{first + s} * kCells + cell);
        seen.insert(cell);
        flags[s * kCells + cell] = kSeenByAny | (cells.size() == 1 ? kSeenByAll : 0);
        counts.push_back(static_cast<int>(seen.size()));
      }
    }
    return table_.begin_step({.first_stream = first,
                              .n_streams = n,
                              .n_per_stream = static_cast<std::uint32_t>(cells.size()),
                              .n_cells = kCells,
                              .rows = rows,
                              .flags = flags,
                              .row_counts = counts});
  }
  void hide(std::uint32_t stream, int cell) { visible_[stream].erase(cell); }
  // Rows come from outside, and the stream's later rows see them.
  std::vector<std::int32_t> restore(std::uint32_t stream, const std::vector<std::int32_t>& list) {
    visible_[stream].insert(list.begin(), list.end());
    return table_.restore(stream, list);
  }
  PageTable& table() { return table_; }

 private:
  PageTable table_;
  std::vector<std::set<int>> visible_;
};

std::vector<int> cells(int first, int n) {
  std::vector<int> list(n);
  std::iota(list.begin(), list.end(), first);
  return list;
}

// Every token that came is in one place: sealed or kept in the tail.
void expect_all_kept(const StreamStep& s) {
  std::vector<int> times(s.window_cells.size());
  for (const auto& seal : s.seals) {
    for (std::uint32_t i = 0; i < seal.block->n_tokens; ++i) {
      ++times[seal.window_begin + i];
      EXPECT_EQ(seal.block->cells[i], s.window_cells[seal.window_begin + i]);
    }
  }
  for (const std::int32_t position : s.keep_from) {
    ++times[position];
  }
  EXPECT_TRUE(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }));
  EXPECT_LT(s.keep_to.size(), std::size_t{kTailTokens});
}

TEST(PageTable, PromptSealsWholePagesAndKeepsSinksAndNewest) {
  Engine engine(1);
  const auto step = engine.step(0, 1, cells(0, 512));
  ASSERT_TRUE(step);
  EXPECT_FALSE(step->is_decode);
  const StreamStep& s = step->streams[0];
  ASSERT_EQ(s.seals.size(), 1u);
  EXPECT_EQ(s.seals[0].block->n_tokens, 448u);  // 512 but for sinks and 28 held, in pages of 64
  EXPECT_TRUE(s.seals[0].is_first);
  expect_all_kept(s);
  EXPECT_EQ(engine.table().live_tokens(), 512u);
  const BlockClasses& classes = s.seals[0].block->classes;
  std::uint32_t n = 0;
  for (int c = 0; c < classes.n_classes; ++c) {
    EXPECT_EQ(classes.classes[c].n_tokens % kPageTokens, 0u);
    n += classes.classes[c].n_tokens;
  }
  EXPECT_EQ(n, 448u);
  EXPECT_EQ(s.seals[0].block->pages.size(), std::size_t{kHeads} * classes.n_pages());
}

TEST(PageTable, DecodeAppendsAndSealsWhenDue) {
  Engine engine(2);
  ASSERT_TRUE(engine.step(0, 2, cells(0, 40)));
  int n_seals = 0;
  for (int token = 0; token < 200; ++token) {
    const auto step = engine.step(0, 2, {40 + token});
    ASSERT_TRUE(step);
    ASSERT_TRUE(step->is_decode) << token;
    for (const StreamStep& s : step->streams) {
      if (!s.seals.empty()) {
        ++n_seals;
        EXPECT_EQ(s.ring_slot, kProbeRing - 1);
        EXPECT_LT(s.ring_first, kProbeRing);
        expect_all_kept(s);
      }
    }
  }
  EXPECT_EQ(n_seals, 2 * 3);
  EXPECT_EQ(engine.table().live_tokens(), 480u);
}

TEST(PageTable, PagesNeverOverlap) {
  Engine engine(3);
  std::set<std::uint32_t> used;
  for (int chunk = 0; chunk < 3; ++chunk) {
    const auto step = engine.step(0, 3, cells(512 * chunk, 512));
    ASSERT_TRUE(step);
    for (const StreamStep& s : step->streams) {
      for (const auto& seal : s.seals) {
        for (const PageEntry& page : seal.block->pages) {
          const PageClass widths = engine.table().classes()[page.cls];
          const int size = page_bytes(kDim, widths) / kTileAlignment;
          for (int unit = 0; unit < size; ++unit) {
            EXPECT_TRUE(used.insert(page.unit + unit).second);
          }
        }
      }
    }
  }
}

TEST(PageTable, OverwrittenCellsDieAndEmptyBlocksAreFreed) {
  Engine engine(1);
  ASSERT_TRUE(engine.step(0, 1, cells(0, 512)));
  const std::uint64_t bytes = engine.table().pool_bytes();
  ASSERT_TRUE(engine.step(0, 1, cells(512, 1)));
  // A new prompt takes the same cells, as after the host forgot the old one without a word.
  for (int cell = 0; cell < 600; ++cell) {
    engine.hide(0, cell);
  }
  const auto step = engine.step(0, 1, cells(0, 512));
  ASSERT_TRUE(step);
  EXPECT_EQ(engine.table().live_tokens(), 513u);
  EXPECT_LE(engine.table().pool_bytes(), 2 * bytes);
  EXPECT_TRUE(step->streams[0].visible.empty());
  expect_all_kept(step->streams[0]);
}

TEST(PageTable, WhatASequenceLeftIsSealedByItselfWhenTheNextStarts) {
  Engine engine(1);
  ASSERT_TRUE(engine.step(0, 1, cells(0, 300)));
  for (int cell = 0; cell < 300; ++cell) {
    engine.hide(0, cell);
  }
  const auto step = engine.step(0, 1, cells(0, 40));
  ASSERT_TRUE(step);
  ASSERT_EQ(step->streams[0].seals.size(), 1u);
  for (const std::int32_t cell : step->streams[0].seals[0].block->cells) {
    EXPECT_GE(cell, 40);  // of the old sequence alone
  }
  expect_all_kept(step->streams[0]);
  // The new one decodes on the path without masks.
  const auto next = engine.step(0, 1, {40});
  ASSERT_TRUE(next);
  EXPECT_TRUE(next->is_decode);
  EXPECT_TRUE(next->streams[0].visible.empty());
}

TEST(PageTable, HiddenSealedTokensTakeTheMaskedPath) {
  Engine engine(1);
  ASSERT_TRUE(engine.step(0, 1, cells(0, 512)));
  engine.hide(0, 100);
  const auto step = engine.step(0, 1, {512});
  ASSERT_TRUE(step);
  EXPECT_FALSE(step->is_decode);
  EXPECT_EQ(step->streams[0].visible.size(), 1u);
}

TEST(PageTable, RestoredRowsAreSealedByTheNextStep) {
  Engine engine(2);
  const std::vector<std::int32_t> all = cells(0, 1000);
  // Keys first, then values of the same cells: the same slots. In two runs.
  const auto slots = engine.restore(1, {all.begin(), all.begin() + 700});
  EXPECT_EQ(engine.restore(1, {all.begin(), all.begin() + 700}), slots);
  EXPECT_EQ(engine.restore(1, {all.begin() + 700, all.end()}).front(), 700);
  EXPECT_EQ(engine.table().live_tokens(), 1000u);
  EXPECT_TRUE(engine.table().holds(1, 999));
  const auto step = engine.step(1, 1, {1000});
  ASSERT_TRUE(step);
  EXPECT_FALSE(step->is_decode);
  const StreamStep& s = step->streams[0];
  ASSERT_EQ(s.restored_from.size(), 1000u);
  EXPECT_TRUE(s.gather_from.empty());
  for (std::size_t i = 0; i < s.restored_from.size(); ++i) {
    EXPECT_EQ(s.window_cells[s.restored_to[i]], s.restored_from[i]);  // slot = cell here
  }
  EXPECT_EQ(s.window_cells[s.place[0]], 1000);
  ASSERT_GE(s.seals.size(), 1u);
  EXPECT_EQ(s.seals[0].window_begin, make_policy().sink_tokens);
  expect_all_kept(s);
  EXPECT_EQ(engine.table().live_tokens(), 1001u);
  EXPECT_TRUE(engine.table().restored_cells(1).empty());
  const auto next = engine.step(1, 1, {1001});
  ASSERT_TRUE(next);
  EXPECT_TRUE(next->is_decode);
}

TEST(PageTable, RestoredRowsReplaceWhatTheirCellsHeld) {
  Engine engine(1);
  ASSERT_TRUE(engine.step(0, 1, cells(0, 512)));
  engine.restore(0, {5, 100, 511});
  EXPECT_EQ(engine.table().live_tokens(), 512u);
  const auto step = engine.step(0, 1, {100});  // and one of them is written again
  ASSERT_TRUE(step);
  EXPECT_EQ(step->streams[0].restored_from, (std::vector<std::int32_t>{0, 2}));
  expect_all_kept(step->streams[0]);
  EXPECT_EQ(engine.table().live_tokens(), 512u);
}

TEST(PageTable, RestoredRowsThatNobodySeesAreSealedInBlocks) {
  Engine engine(1);
  engine.table().restore(0, cells(0, 1500));  // of another sequence
  const auto step = engine.step(0, 1, cells(1500, 40));
  ASSERT_TRUE(step);
  for (const auto& seal : step->streams[0].seals) {
    EXPECT_LE(seal.block->n_tokens, 512u);
  }
  expect_all_kept(step->streams[0]);
}

TEST(PageTable, CopiedStreamsSharePagesUntilTheLastIsGone) {
  Engine engine(3);
  ASSERT_TRUE(engine.step(0, 1, cells(0, 600)));
  PageTable& table = engine.table();
  const std::uint64_t bytes = table.pool_bytes();
  table.copy_stream(0, 1);
  table.copy_stream(1, 2);
  EXPECT_EQ(table.live_tokens(), 1800u);
  EXPECT_EQ(table.tail_cells(2), table.tail_cells(0));
  ASSERT_EQ(table.blocks(2).size(), table.blocks(0).size());
  EXPECT_EQ(table.blocks(2)[0]->pages[0].unit, table.blocks(0)[0]->pages[0].unit);
  EXPECT_NE(table.blocks(2)[0]->first_cell, table.blocks(0)[0]->first_cell);
  // A cell dies in one of them only.
  const std::int32_t cell = table.blocks(0)[0]->cells[7];
  table.restore(1, std::vector<std::int32_t>{cell});
  EXPECT_EQ(table.blocks(0)[0]->cells[7], cell);
  EXPECT_EQ(table.blocks(1)[0]->cells[7], -1);
  // What the first leaves is not given to others while the third has it.
  std::set<std::uint32_t> shared;
  for (const auto& block : table.blocks(2)) {
    for (const PageEntry& page : block->pages) {
      shared.insert(page.unit);
    }
  }
  table.clear_stream(0);
  table.clear_stream(1);
  std::vector<std::int64_t> rows;
  std::vector<std::uint8_t> flags(kCells, kSeenByAny);
  std::vector<std::int32_t> counts;
  for (int n = 0; n < 600; ++n) {
    rows.push_back(n);
    counts.push_back(n + 1);
  }
  const auto fresh = table.begin_step({.first_stream = 0,
                                       .n_streams = 1,
                                       .n_per_stream = 600,
                                       .n_cells = kCells,
                                       .rows = rows,
                                       .flags = flags,
                                       .row_counts = counts});
  ASSERT_TRUE(fresh);
  for (const auto& seal : fresh->streams[0].seals) {
    for (const PageEntry& page : seal.block->pages) {
      EXPECT_FALSE(shared.contains(page.unit));
    }
  }
  table.clear_stream(0);
  table.clear_stream(2);
  EXPECT_EQ(table.live_tokens(), 0u);
  ASSERT_TRUE(table.begin_step({.first_stream = 0,
                                .n_streams = 1,
                                .n_per_stream = 600,
                                .n_cells = kCells,
                                .rows = rows,
                                .flags = flags,
                                .row_counts = counts}));
  EXPECT_LE(table.pool_bytes(), 2 * bytes);  // the pages of the last one are free again
}

TEST(PageTable, SharedPagesAreGivenUpForOwnOnes) {
  Engine engine(2);
  ASSERT_TRUE(engine.step(0, 1, cells(0, 600)));
  PageTable& table = engine.table();
  EXPECT_FALSE(table.own_pages(0, 0));  // it shares none
  table.copy_stream(0, 1);
  table.restore(1, std::vector<std::int32_t>{table.blocks(1)[0]->cells[3]});  // one is dead
  const PagedBlock before = *table.blocks(1)[0];
  const std::optional<PagedBlock> shared = table.own_pages(1, 0);
  ASSERT_TRUE(shared);
  const PagedBlock& own = *table.blocks(1)[0];
  EXPECT_EQ(shared->pages[0].unit, table.blocks(0)[0]->pages[0].unit);
  EXPECT_EQ(own.cells, before.cells);
  EXPECT_EQ(own.n_live, before.n_live);
  EXPECT_NE(own.serial, before.serial);
  EXPECT_NE(own.first_set, shared->first_set);
  EXPECT_NE(own.first_rank, shared->first_rank);
  ASSERT_EQ(own.pages.size(), shared->pages.size());
  for (std::size_t n = 0; n < own.pages.size(); ++n) {
    EXPECT_NE(own.pages[n].unit, shared->pages[n].unit);
    EXPECT_EQ(own.pages[n].cls, shared->pages[n].cls);
    EXPECT_EQ(own.pages[n].tokens, shared->pages[n].tokens);
  }
  EXPECT_FALSE(table.own_pages(1, 0));
  EXPECT_FALSE(table.own_pages(0, 0));  // nor does the first any more
}

TEST(PageTable, RowsOutsideOfTheirStreamAreRefused) {
  Engine engine(1);
  const std::vector<std::int64_t> rows{kCells};
  const std::vector<std::uint8_t> flags(kCells);
  const std::vector<std::int32_t> counts{1};
  EXPECT_FALSE(engine.table().begin_step({.first_stream = 0,
                                          .n_streams = 1,
                                          .n_per_stream = 1,
                                          .n_cells = kCells,
                                          .rows = rows,
                                          .flags = flags,
                                          .row_counts = counts}));
}

// The sum of the queries' power starts anew with a sequence, not with a chunk.
TEST(PageTable, QueryPowerFollowsTheSequence) {
  Engine engine(1);
  EXPECT_TRUE(engine.table().has_wide_channels());
  EXPECT_FALSE(engine.step(0, 1, cells(0, 200))->streams[0].adds_query_power);
  EXPECT_TRUE(engine.step(0, 1, cells(200, 200))->streams[0].adds_query_power);
  for (int cell = 0; cell < 400; ++cell) {
    engine.hide(0, cell);
  }
  EXPECT_FALSE(engine.step(0, 1, cells(0, 8))->streams[0].adds_query_power);
  EXPECT_TRUE(engine.step(0, 1, cells(8, 100))->streams[0].adds_query_power);
}

// A sequence of single tokens: its first sealing brings the first probes.
TEST(PageTable, QueryPowerOfDecodeStartsWithTheFirstSealing) {
  Engine engine(1);
  std::vector<bool> adds;
  for (int token = 0; token < 300; ++token) {
    const auto step = engine.step(0, 1, {token});
    ASSERT_TRUE(step && step->is_decode) << token;
    if (!step->streams[0].seals.empty()) {
      adds.push_back(step->streams[0].adds_query_power);
    }
  }
  EXPECT_EQ(adds, (std::vector<bool>{false, true, true, true}));
}

TEST(DevicePolicy, TheDefaultHasPagesWithWideChannels) {
  const auto asked = policy::make_policy({});
  const auto used = device_policy(*asked);
  ASSERT_TRUE(used) << used.error().message;
  for (const int head_dim : {64, 128, 256}) {
    const auto classes = page_classes(*used, head_dim);
    EXPECT_EQ(classes[0].key_bits, 4);
    EXPECT_EQ(classes[0].wide_chunks, 0) << "4 bits everywhere";
    EXPECT_EQ(classes[3].key_bits, 2);
    EXPECT_EQ(classes[3].wide_chunks * kChunkChannels * 2, head_dim);
    EXPECT_EQ(classes[3].wide_bits, 4);
    EXPECT_EQ(classes[2].value_bits, 3);
    EXPECT_EQ(classes[3].value_bits, 2);
  }
  EXPECT_EQ(device_policy_note(*asked, *used).find("wide"), std::string::npos);
}

TEST(DevicePolicy, WideChannelsAreCountedInStepsOf32) {
  const auto chunks = [](const char* share, int head_dim) {
    const auto used = device_policy(*policy::make_policy({{"key-wide", share}}));
    return int{page_classes(*used, head_dim)[3].wide_chunks};
  };
  EXPECT_EQ(chunks("25", 64), 1);
  EXPECT_EQ(chunks("25", 128), 1);
  EXPECT_EQ(chunks("25", 256), 2);
  EXPECT_EQ(chunks("10", 128), 0);
  EXPECT_EQ(chunks("100", 128), 3) << "some are not wide";
  const auto asked = policy::make_policy({{"key-wide", "25"}});
  EXPECT_NE(device_policy_note(*asked, *device_policy(*asked)).find("steps of 32"),
            std::string::npos);
}

TEST(DevicePolicy, WhatPagesCannotHoldIsRefused) {
  const std::map<std::string, std::string> settings[] = {
      {{"kv-bits", "3"}}, {{"key-wide-bits", "8"}}, {{"key-bits", "4,3"}, {"key-wide", "50"}}};
  for (const auto& refused : settings) {
    const auto asked = policy::make_policy(refused);
    ASSERT_TRUE(asked);
    EXPECT_FALSE(device_policy(*asked)) << refused.begin()->first;
  }
  for (const char* name : {"kivi", "gear", "h2o", "mikv"}) {
    const auto asked = policy::make_policy({{"policy", name}});
    ASSERT_TRUE(asked) << name;
    EXPECT_FALSE(device_policy(*asked)) << name;
  }
  for (const char* name : {"static", "skvq"}) {
    const policy::Calibration flat = policy::flat_calibration(2, 64, 64);
    const auto asked = policy::make_policy({{"policy", name}}, &flat);
    ASSERT_TRUE(asked) << name;
    const auto served = device_policy(*asked);
    ASSERT_FALSE(served) << name;
    EXPECT_NE(served.error().message.find("quantized in another granularity, supported"),
              std::string::npos)
        << served.error().message;
  }
  const auto uniform =
      policy::make_policy({{"policy", "uniform"}, {"key-bits", "8"}, {"value-bits", "8"}});
  ASSERT_TRUE(uniform);
  EXPECT_TRUE(device_policy(*uniform));
}

}  // namespace
}  // namespace zipcache::cuda
