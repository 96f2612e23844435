// The golden vectors of the method's specification, worked out by hand there.
#include "ref/quant_ref.h"

#include <gtest/gtest.h>

#include "ref/official_packing_ref.h"

namespace zipcache::ref {
namespace {

constexpr double kPrinted = 1e-6;  // the specification prints 6 decimals

void expect_near(const std::vector<double>& got, const std::vector<double>& want, double bound) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t at = 0; at < got.size(); ++at) {
    EXPECT_NEAR(got[at], want[at], bound) << "at " << at;
  }
}

TEST(QuantRef, ChannelwiseGolden) {
  const std::vector<double> x{8, -6, 2};
  const Quantized got = channelwise(x, 3, 1, 2);
  EXPECT_EQ(got.codes, (std::vector<int>{3, 0, 2}));
  EXPECT_NEAR(got.params[0].scale, 4.666667, kPrinted);
  EXPECT_EQ(got.params[0].min, -6);
  expect_near(got.values, {8, -6, 10.0 / 3}, kPrinted);
}

TEST(QuantRef, IntegerOffsetGolden) {
  const std::vector<double> x{8, -6, 2};
  const Quantized got = channelwise_integer_offset(x, 3, 1, 2);
  EXPECT_EQ(got.codes, (std::vector<int>{3, 0, 1}));
  EXPECT_NEAR(got.params[0].min, -1 * 14.0 / 3, kPrinted) << "z is 1";
  expect_near(got.values, {28.0 / 3, -14.0 / 3, 0}, kPrinted);
}

TEST(QuantRef, ChannelSeparableGolden) {
  const std::vector<double> v{.5, -2, 8, .1, 1, -1, -6, .4, -.5, 0, 2, -.2};
  const Quantized got = channel_separable(v, 3, 4, 2);
  expect_near(got.factors, {1, 1.414214, 2.828427, .632456}, kPrinted);
  EXPECT_EQ(got.codes, (std::vector<int>{1, 0, 3, 1, 3, 1, 0, 3, 0, 1, 3, 0}));
  expect_near({got.params[0].min, got.params[1].min, got.params[2].min}, {-1.414214, -2.12132, -.5},
              kPrinted);
  expect_near({got.params[0].scale, got.params[1].scale, got.params[2].scale},
              {1.414214, 1.04044, .402369}, kPrinted);
  expect_near(got.values, {0, -2, 8, 0, 1, -1.528595, -6, .632456, -.5, -.138071, 2, -.316228},
              kPrinted);
}

TEST(QuantRef, TokenwiseGolden) {
  const std::vector<double> row{.5, -2, 8, .1};
  const Quantized got = tokenwise(row, 1, 4, 2);
  EXPECT_EQ(got.codes, (std::vector<int>{1, 0, 3, 1}));
  EXPECT_NEAR(got.params[0].scale, 3.333333, kPrinted);
  EXPECT_EQ(got.params[0].min, -2);
  expect_near(got.values, {4.0 / 3, -2, 8, 4.0 / 3}, kPrinted);
}

TEST(QuantRef, GroupsAreIndependentRows) {
  const std::vector<double> row{.5, -2, 8, .1, 1, -1, -6, .4};
  const Quantized got = groupwise(row, 1, 8, 4, 2);
  const Quantized left = tokenwise(std::span(row).first(4), 1, 4, 2);
  const Quantized right = tokenwise(std::span(row).last(4), 1, 4, 2);
  ASSERT_EQ(got.params.size(), 2u);
  for (std::size_t at = 0; at < 4; ++at) {
    EXPECT_EQ(got.values[at], left.values[at]);
    EXPECT_EQ(got.values[4 + at], right.values[at]);
  }
}

TEST(QuantRef, RoundsHalfToEvenAndClamps) {
  const QuantParams unit{1, 0};
  EXPECT_EQ(float_min_code(0.5, unit, 2), 0);
  EXPECT_EQ(float_min_code(1.5, unit, 2), 2);
  EXPECT_EQ(float_min_code(2.5, unit, 2), 2);
  EXPECT_EQ(float_min_code(9.0, unit, 2), 3);
  EXPECT_EQ(float_min_code(-9.0, unit, 2), 0);
}

TEST(QuantRef, ShrunkRangeKeepsItsCentre) {
  const std::vector<double> set{-1, 7, 3};
  expect_near(shrunk_range(set, 0.5), {1, 5}, 0);
  expect_near(shrunk_range(set, 1), {-1, 7}, 0);
}

TEST(OfficialPacking, Golden) {
  const std::vector<std::uint8_t> two{0, 1, 2, 3, 3, 2, 1, 0};
  const std::vector<std::uint8_t> four{0, 1, 2, 3, 15, 14, 13, 12};
  EXPECT_EQ(official_pack2(two), (std::vector<std::uint8_t>{120, 45}));
  EXPECT_EQ(official_pack4(four), (std::vector<std::uint8_t>{240, 225, 210, 195}));
  EXPECT_EQ(official_unpack2(official_pack2(two)), two);
  EXPECT_EQ(official_unpack4(official_pack4(four)), four);
}

}  // namespace
}  // namespace zipcache::ref
