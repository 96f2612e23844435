#include "cache/cuda/mask_summary.h"

#include <gtest/gtest.h>

#include <random>
#include <tuple>
#include <vector>

namespace zipcache::cuda {
namespace {

class MaskSummaryTest : public testing::TestWithParam<std::tuple<int, int, int>> {};

TEST_P(MaskSummaryTest, FlagsAndCountsAreTheirDefinitions) {
  const auto [n_planes, n_rows, n_cells] = GetParam();
  const std::int64_t row_stride = n_cells + 3, plane_stride = row_stride * n_rows + 5;
  std::vector<HalfBits> mask(plane_stride * n_planes + 1);
  std::mt19937 random(7);
  for (HalfBits& x : mask) {  // -inf hides; a finite bias, infinity and NaN do not
    constexpr HalfBits kOf[] = {0xfc00, 0xfc00, 0, 0x8000, 0xbc00, 0x7c00, 0x7e00};
    x = kOf[random() % std::size(kOf)];
  }
  std::vector<std::uint8_t> flags(n_planes * n_cells + 1, 0xcd);
  std::vector<std::int32_t> counts(n_planes * n_rows + 1, -7);
  MaskSummaryParams p;
  p.n_planes = n_planes, p.n_rows = n_rows, p.n_cells = n_cells;
  p.mask = mask.data(), p.plane_stride = plane_stride, p.row_stride = row_stride;
  p.flags = flags.data(), p.row_counts = counts.data();
  summarize_mask_on_host(p);
  for (int plane = 0; plane < n_planes; ++plane) {
    std::vector<int> n_seeing(n_cells);
    for (int row = 0; row < n_rows; ++row) {
      int n_seen = 0;
      for (int cell = 0; cell < n_cells; ++cell) {
        const bool seen = mask[plane * plane_stride + row * row_stride + cell] != 0xfc00;
        n_seen += seen;
        n_seeing[cell] += seen;
      }
      EXPECT_EQ(counts[plane * n_rows + row], n_seen) << plane << ' ' << row;
    }
    for (int cell = 0; cell < n_cells; ++cell) {
      const int expected =
          n_rows == 0 ? 0
                      : (n_seeing[cell] > 0) * kSeenByAny + (n_seeing[cell] == n_rows) * kSeenByAll;
      EXPECT_EQ(flags[plane * n_cells + cell], expected) << plane << ' ' << cell;
    }
  }
  EXPECT_EQ(flags.back(), 0xcd);
  EXPECT_EQ(counts.back(), -7);
}

INSTANTIATE_TEST_SUITE_P(Shapes, MaskSummaryTest,
                         testing::Combine(testing::Values(1, 3), testing::Values(0, 1, 2, 17),
                                          testing::Values(0, 1, 31, 256, 257)));
// More than 16 bits count in a row.
INSTANTIATE_TEST_SUITE_P(LongRows, MaskSummaryTest,
                         testing::Combine(testing::Values(1), testing::Values(1, 2),
                                          testing::Values(32767, 32768, 32769, 140000)));

}  // namespace
}  // namespace zipcache::cuda
