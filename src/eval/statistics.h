// The statistics of the evaluation: means with errors, percentiles, and tests between two policies
// that met the same items.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace zipcache::eval {

struct Estimate {
  double mean = 0;
  double error = 0;  // standard error; 0 for ten values or fewer, as llama-perplexity has it
};
Estimate estimate_mean(std::span<const double> values);

// Covariance of the means of x and y. REQUIRES: equal lengths.
double mean_covariance(std::span<const double> x, std::span<const double> y);

// Linear interpolation between neighbours; fraction in [0, 1].
// REQUIRES: `sorted` is ascending and not empty.
double percentile(std::span<const float> sorted, double fraction);

// McNemar's exact test, two-sided: how likely so uneven a split of the items that only one of two
// policies solved is, were both equally good. 1 when there are none.
double mcnemar_p(std::size_t only_first, std::size_t only_second);

struct Interval {
  double low = 0;
  double high = 0;
};

// 95 % interval of the mean by the percentile bootstrap, resampling runs of `block` neighbours (1 =
// single values): neighbours in a text depend on each other. The same seed gives the same interval.
Interval bootstrap_mean(std::span<const double> values, std::size_t block, std::uint64_t seed);

}  // namespace zipcache::eval
