#include "ref/saliency_ref.h"

#include <gtest/gtest.h>

namespace zipcache::ref {
namespace {

const std::vector<double> kA{1,  0,  0,  0, .6, .4, 0,  0,  //
                             .5, .2, .3, 0, .3, .1, .1, .5};
const std::vector<std::uint8_t> kCausal{1, 0, 0, 0, 1, 1, 0, 0,  //
                                        1, 1, 1, 0, 1, 1, 1, 1};
const std::vector<std::size_t> kAllRows{0, 1, 2, 3};
const std::vector<std::size_t> kProbes{1, 3};

void expect_near(const std::vector<double>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t at = 0; at < got.size(); ++at) {
    EXPECT_NEAR(got[at], want[at], 1e-5) << "token " << at;
  }
}

TEST(SaliencyRef, GoldenOfTheSpecification) {
  expect_near(accumulated_scores(kA, 4, kAllRows), {2.4, .7, .4, .5});
  expect_near(normalized_scores(kA, kCausal, 4, kAllRows), {.6, .23333, .2, .5});
  expect_near(normalized_scores(kA, kCausal, 4, kProbes), {.45, .25, .1, .5});
  expect_near(official_scores(kA, 4, kProbes), {.225, .166667, .05, .5});
}

TEST(SaliencyRef, CountsVisiblePlacesNotNonzeroWeights) {
  const std::vector<double> a{1, 0, 0, 1};  // row 1 sees token 0 and gives it nothing
  const std::vector<std::uint8_t> visible{1, 0, 1, 1};
  expect_near(normalized_scores(a, visible, 2, std::vector<std::size_t>{0, 1}), {.5, 1});
}

TEST(SaliencyRef, AnUnseenTokenScoresZeroAndARepeatedProbeCountsTwice) {
  expect_near(normalized_scores(kA, kCausal, 4, std::vector<std::size_t>{0}), {1, 0, 0, 0});
  expect_near(accumulated_scores(kA, 4, std::vector<std::size_t>{3, 3}), {.6, .2, .2, 1});
  expect_near(normalized_scores(kA, kCausal, 4, std::vector<std::size_t>{1, 3, 3}),
              {.4, .2, .1, .5});
}

}  // namespace
}  // namespace zipcache::ref
