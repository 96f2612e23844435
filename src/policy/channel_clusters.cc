#include "policy/channel_clusters.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"

namespace zipcache::policy {
namespace {

// Rounds are few in practice; the limit bounds the time whatever the numbers are.
constexpr int kMaxRounds = 100;
// Of the squared sums: exchanges that gain less are rounding.
constexpr double kLeastGain = 1e-9;

struct Point {
  double low = 0, high = 0;

  Point operator+(const Point& other) const { return {low + other.low, high + other.high}; }
  Point operator-(const Point& other) const { return {low - other.low, high - other.high}; }
  double square() const { return low * low + high * high; }
};

}  // namespace

std::vector<std::uint16_t> cluster_channels(std::span<const float> low, std::span<const float> high,
                                            std::uint32_t cluster_channels) {
  const std::size_t n = low.size();
  ZC_CHECK(high.size() == n && cluster_channels > 0 && n % cluster_channels == 0);
  std::vector<Point> points(n);
  for (std::size_t c = 0; c < n; ++c) {
    points[c] = {low[c], high[c]};
  }
  std::vector<std::uint16_t> order(n);
  std::iota(order.begin(), order.end(), std::uint16_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::uint16_t a, std::uint16_t b) {
    return points[a].high - points[a].low < points[b].high - points[b].low;
  });
  std::vector<Point> sums(n / cluster_channels);
  for (std::size_t place = 0; place < n; ++place) {
    Point& sum = sums[place / cluster_channels];
    sum = sum + points[order[place]];
  }

  // With equal sizes the sum of squared distances is a constant less the squares of the sums: what
  // an exchange gains is known without looking at the other points.
  bool moved = true;
  for (int round = 0; moved && round < kMaxRounds; ++round) {
    moved = false;
    for (std::size_t a = 0; a < n; ++a) {
      Point& sum_a = sums[a / cluster_channels];
      for (std::size_t b = (a / cluster_channels + 1) * cluster_channels; b < n; ++b) {
        Point& sum_b = sums[b / cluster_channels];
        const Point step = points[order[b]] - points[order[a]];
        const double before = sum_a.square() + sum_b.square();
        const double after = (sum_a + step).square() + (sum_b - step).square();
        if (after > before * (1 + kLeastGain)) {
          sum_a = sum_a + step;
          sum_b = sum_b - step;
          std::swap(order[a], order[b]);
          moved = true;
        }
      }
    }
  }
  for (auto begin = order.begin(); begin != order.end(); begin += cluster_channels) {
    std::sort(begin, begin + cluster_channels);
  }
  return order;
}

}  // namespace zipcache::policy
