// What the cache ranks highest is what the formulas of ref/ rank highest, for every metric that
// looks at attention: masses travel through tiles, pages and threads on their way.
#include "cache/sealer.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "cache/test_engine.h"
#include "ref/saliency_ref.h"

namespace zipcache::cache {
namespace {

constexpr std::uint32_t kTokens = 96;

// Tokens of a KV head from the least to the most salient, by the formulas.
std::vector<std::size_t> expected_ranking(const std::string& metric,
                                          const std::vector<double>& weights) {
  const std::vector<std::uint8_t> visible = ref::causal_mask(kTokens, kTokens, 0);
  std::vector<std::size_t> rows(kTokens);
  std::iota(rows.begin(), rows.end(), std::size_t{0});
  if (metric == "roco") {
    return ref::roco_ranking(weights, visible, kTokens, rows);
  }
  if (metric == "last-token") {
    rows = {kTokens - 1};
  }
  const std::vector<double> scores =
      metric == "normalized" ? ref::normalized_scores(weights, visible, kTokens, rows)
      : metric == "official" ? ref::official_scores(weights, kTokens, rows)
                             : ref::accumulated_scores(weights, kTokens, rows);
  std::vector<std::size_t> order(kTokens);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return scores[a] < scores[b]; });
  return order;
}

TEST(Sealer, RanksAsTheFormulasDo) {
  for (const char* metric : {"normalized", "accumulated", "official", "last-token", "roco"}) {
    SCOPED_TRACE(metric);
    std::map<std::string, std::string> settings{
        {"metric", metric}, {"key-bits", "4,2"}, {"value-bits", "4"},  {"sinks", "0"},
        {"hold", "0"},      {"block", "0"},      {"key-salient", "50"}};
    if (metric != std::string("last-token")) {
      settings["probes"] = "all";
    }
    const TestDims dims;
    TestEngine engine(dims, settings, kernels::select_kernels("").value(), 3, 21);
    const std::vector<double> weights = engine.step({{0, kTokens}}, false).weights;
    const auto& segments = engine.cache().segments();
    const auto sealed = std::find_if(segments.begin(), segments.end(),
                                     [](const Segment& s) { return s.block != nullptr; });
    ASSERT_NE(sealed, segments.end());
    for (std::uint32_t head = 0; head < dims.n_kv_heads; ++head) {
      std::vector<double> of_group(std::size_t{kTokens} * kTokens);
      for (std::size_t row = 0; row < kTokens; ++row) {
        for (std::uint32_t g = 0; g < dims.group; ++g) {
          const std::size_t query_head = head * dims.group + g;
          const double* a =
              &weights[(row * dims.n_kv_heads * dims.group + query_head) * dims.n_cells];
          for (std::size_t token = 0; token < kTokens; ++token) {
            of_group[row * kTokens + token] += a[engine.cells(0)[token]];
          }
        }
      }
      const auto order = expected_ranking(metric, of_group);
      std::vector<std::uint8_t> tiers(kTokens);
      format::read_tiers(*sealed->block->layout, sealed->block->bytes.data(), head, tiers.data());
      for (std::size_t rank = 0; rank < kTokens; ++rank) {
        EXPECT_EQ(tiers[order[rank]], rank < kTokens / 2 ? 1 : 0) << head << " rank " << rank;
      }
    }
  }
}

// b = sqrt(max |q| / max |k|) of the prompt; keys are stored times b, so 1/b is the factor. It is
// frozen: later tokens use it too.
TEST(Sealer, BalancesKeysByTheQueriesOfThePrompt) {
  const TestDims dims;
  TestEngine engine(dims, {{"policy", "mikv"}}, kernels::select_kernels("").value(), 1, 4);
  constexpr std::uint32_t kPrompt = 60;
  engine.step({{0, kPrompt}}, false);
  for (int i = 0; i < 100; ++i) {
    engine.step({{0, 1}}, false);
  }
  const std::uint32_t width = dims.n_kv_heads * dims.key_dim;
  std::vector<float> key_max(width), query_max(width);
  for (std::uint32_t position = 0; position < kPrompt; ++position) {
    const auto keys = engine.row(0, position, 0, width);
    const auto queries = engine.row(0, position, 2, width * dims.group);
    for (std::uint32_t c = 0; c < width; ++c) {
      key_max[c] = std::max(key_max[c], std::abs(round_to_half(keys[c])));
    }
    for (std::uint32_t c = 0; c < width * dims.group; ++c) {
      const std::uint32_t channel = c / dims.key_dim / dims.group * dims.key_dim + c % dims.key_dim;
      query_max[channel] = std::max(query_max[channel], std::abs(queries[c]));
    }
  }
  int n_blocks = 0;
  for (const Segment& segment : engine.cache().segments()) {
    if (segment.block == nullptr) {
      continue;
    }
    ++n_blocks;
    const format::BlockLayout& layout = *segment.block->layout;
    for (std::uint32_t c = 0; c < width; ++c) {
      Half factor;
      std::memcpy(&factor,
                  segment.block->bytes.data() +
                      layout.channel_factor(Tensor::kKey, c / dims.key_dim, 0) +
                      c % dims.key_dim * sizeof factor,
                  sizeof factor);
      ASSERT_EQ(half_to_float(factor), round_to_half(std::sqrt(key_max[c] / query_max[c]))) << c;
    }
  }
  EXPECT_EQ(n_blocks, 2);
}

std::vector<const SealedBlock*> blocks_of(const LayerCache& cache) {
  std::vector<const SealedBlock*> blocks;
  for (const Segment& segment : cache.segments()) {
    if (segment.block != nullptr) {
      blocks.push_back(segment.block.get());
    }
  }
  std::sort(blocks.begin(), blocks.end(), [](const SealedBlock* a, const SealedBlock* b) {
    return a->n_tokens() < b->n_tokens();
  });
  return blocks;
}

TEST(Sealer, DecodedTokensJoinTheLastBlock) {
  for (const bool scatter : {false, true}) {
    TestEngine engine({}, {}, kernels::select_kernels("").value(), 1, 4);
    engine.step({{0, 130}}, scatter);
    const auto blocks = blocks_of(engine.cache());
    ASSERT_EQ(blocks.size(), 1u);
    EXPECT_EQ(blocks[0]->n_tokens(), 128u);
    for (int i = 0; i < 15; ++i) {
      engine.step({{0, 1}}, false);
    }
    EXPECT_EQ(blocks[0]->n_tokens(), 128u);
    engine.step({{0, 1}}, false);
    ASSERT_EQ(blocks_of(engine.cache()).size(), 1u);
    // Scattered cells of the prompt end somewhere beyond those of the decoded tokens.
    EXPECT_EQ(blocks[0]->n_tokens(), scatter ? 128u : 144u);
  }
}

TEST(Sealer, ABlockThatLostATokenGrowsNoMore) {
  TestEngine engine({}, {}, kernels::select_kernels("").value(), 1, 4);
  engine.step({{0, 130}}, false);
  const std::vector<Half> zeros(1024);
  const std::uint32_t cell = engine.cells(0)[70];
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    ASSERT_TRUE(engine.cache().put(tensor, {&cell, 1}, {zeros.data(), 0, true}));
  }
  for (int i = 0; i < 63; ++i) {
    engine.step({{0, 1}}, false);
  }
  ASSERT_EQ(blocks_of(engine.cache()).size(), 1u);
  engine.step({{0, 1}}, false);
  std::vector<std::uint32_t> sizes;
  for (const SealedBlock* block : blocks_of(engine.cache())) {
    sizes.push_back(block->n_tokens());
  }
  EXPECT_EQ(sizes, (std::vector<std::uint32_t>{64, 128}));
}

// The newest 30 % are salient whatever their attention.
TEST(Sealer, PutsTheNewestFirst) {
  TestEngine engine({}, {{"policy", "mikv"}}, kernels::select_kernels("").value(), 1, 4);
  engine.step({{0, 100}}, false);
  const auto& segments = engine.cache().segments();
  const auto sealed = std::find_if(segments.begin(), segments.end(),
                                   [](const Segment& s) { return s.block != nullptr; });
  ASSERT_NE(sealed, segments.end());
  std::vector<std::uint8_t> tiers(100);
  format::read_tiers(*sealed->block->layout, sealed->block->bytes.data(), 0, tiers.data());
  EXPECT_EQ(std::count(tiers.begin(), tiers.end(), 0), 60);
  EXPECT_EQ(std::count(tiers.begin() + 70, tiers.end(), 0), 30);
}

}  // namespace
}  // namespace zipcache::cache
