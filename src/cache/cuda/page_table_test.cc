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
  EXPECT_EQ(s.seals[0].block->n_tokens, 448u);  // 512 - 4 sinks - 28 held, in pages of 64
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
