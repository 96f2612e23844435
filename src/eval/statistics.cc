#include "eval/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "base/philox.h"

namespace zipcache::eval {
namespace {

constexpr std::size_t kFewValues = 10;
constexpr int kResamples = 2000;
constexpr double kTail = 0.025;

double mean(std::span<const double> values) {
  return values.empty()
             ? 0
             : std::accumulate(values.begin(), values.end(), 0.0) / double(values.size());
}

}  // namespace

double mean_covariance(std::span<const double> x, std::span<const double> y) {
  ZC_CHECK(x.size() == y.size());
  if (x.size() <= kFewValues) {
    return 0;
  }
  const double mean_x = mean(x), mean_y = mean(y);
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    sum += (x[i] - mean_x) * (y[i] - mean_y);
  }
  return sum / double(x.size()) / double(x.size() - 1);
}

Estimate estimate_mean(std::span<const double> values) {
  return {mean(values), std::sqrt(mean_covariance(values, values))};
}

double percentile(std::span<const float> sorted, double fraction) {
  ZC_CHECK(!sorted.empty() && fraction >= 0 && fraction <= 1);
  const double place = fraction * double(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  const double part = place - double(below);
  return (1 - part) * double(sorted[below]) + part * double(sorted[above]);
}

double mcnemar_p(std::size_t only_first, std::size_t only_second) {
  const std::size_t n = only_first + only_second;
  const std::size_t fewer = std::min(only_first, only_second);
  if (2 * fewer == n) {
    return 1;
  }
  double tail = 0;  // of a fair coin: at most `fewer` heads in n
  for (std::size_t k = 0; k <= fewer; ++k) {
    tail += std::exp(std::lgamma(double(n) + 1) - std::lgamma(double(k) + 1) -
                     std::lgamma(double(n - k) + 1) - double(n) * std::log(2.0));
  }
  return std::min(1.0, 2 * tail);
}

Interval bootstrap_mean(std::span<const double> values, std::size_t block, std::uint64_t seed) {
  ZC_CHECK(block > 0);
  if (values.empty()) {
    return {};
  }
  std::vector<double> sums;
  std::vector<std::size_t> sizes;
  for (std::size_t begin = 0; begin < values.size(); begin += block) {
    const auto run = values.subspan(begin, std::min(block, values.size() - begin));
    sums.push_back(std::accumulate(run.begin(), run.end(), 0.0));
    sizes.push_back(run.size());
  }
  Philox random(seed, /*layer=*/0, /*offset=*/0);
  std::vector<double> means(kResamples);
  for (double& resampled : means) {
    double sum = 0;
    std::size_t n = 0;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const std::uint32_t drawn = random.below(static_cast<std::uint32_t>(sums.size()));
      sum += sums[drawn];
      n += sizes[drawn];
    }
    resampled = sum / double(n);
  }
  std::sort(means.begin(), means.end());
  const auto at = [&](double fraction) {
    return means[static_cast<std::size_t>(std::lround(fraction * (kResamples - 1)))];
  };
  return {at(kTail), at(1 - kTail)};
}

}  // namespace zipcache::eval
