// Every head size and group of query heads that models have, on every table: all visible and
// masked.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "cache/test_engine.h"

namespace zipcache::cache {
namespace {

constexpr std::uint32_t kMaxGroup = 8;
// Of the largest value: fixed-point operands, sums in float beside the oracle's double, and packed
// and sealed rows that the oracle reads rounded to fp16.
constexpr double kTolerance = 4e-3;

using Shape = std::tuple<std::uint32_t, const char*>;  // head_dim, table

class AttentionShapes : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    const auto table = kernels::select_kernels(std::get<1>(GetParam()));
    if (!table) {
      GTEST_SKIP() << table.error().message;
    }
    kernels_ = *table;
  }

  static void expect_close(const TestEngine::Outcome& outcome, const std::string& where) {
    double worst = 0;
    for (std::size_t i = 0; i < outcome.out.size(); ++i) {
      ASSERT_FALSE(std::isnan(outcome.out[i])) << where << " at " << i;
      worst = std::max(worst, std::abs(outcome.out[i] - outcome.expected[i]));
    }
    EXPECT_LE(worst, kTolerance * outcome.largest_value) << where;
  }

  const kernels::KernelTable* kernels_ = nullptr;
};

TEST_P(AttentionShapes, EqualTheOracle) {
  TestDims dims;
  dims.key_dim = dims.value_dim = std::get<0>(GetParam());
  dims.n_cells = 256;
  for (dims.group = 1; dims.group <= kMaxGroup; ++dims.group) {
    const std::string where = "group " + std::to_string(dims.group);
    TestEngine engine(dims, {}, kernels_, 1 + dims.group % 2, dims.group);
    expect_close(engine.step({{0, 130}}, false), where + ", prompt");
    ASSERT_GT(engine.cache().bytes().sealed_tokens, 0u);
    expect_close(engine.step({{0, 1}}, false), where + ", all visible");
    expect_close(engine.step({{1, 70}}, false), where + ", another sequence");
    expect_close(engine.step({{0, 1}, {1, 1}}, false), where + ", masked");
  }
}

INSTANTIATE_TEST_SUITE_P(HeadSizes, AttentionShapes,
                         testing::Combine(testing::Values(64u, 80u, 96u, 128u, 256u),
                                          testing::Values("scalar", "avx2", "avxvnni", "avx512")),
                         [](const auto& info) {
                           return std::to_string(std::get<0>(info.param)) + "_" +
                                  std::get<1>(info.param);
                         });

}  // namespace
}  // namespace zipcache::cache
