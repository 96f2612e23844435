// What the cache ranks highest is what the formulas of ref/ rank highest, for every metric that
// looks at attention: masses travel through tiles, pages and threads on their way.
#include "cache/sealer.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace zipcache::cache
